/** What programs of the host are given of our environment: nothing. */
import { searchPath } from '../images/processes.ts'

export const programsEnv = { PATH: searchPath, LC_ALL: 'C' }
