/** Names beyond ASCII: large tables that most code never needs. */
export { toASCII, toUnicode } from 'tr46/index.js'
