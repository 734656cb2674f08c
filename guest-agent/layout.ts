/** Where the agent has what: none of it is below `rootPath`, which is all that the workload sees. */

/** The workload’s root, as the agent sees it. */
export const rootPath = '/root'
export const ownPath = '/vulcan'
export const groupPath = `${ownPath}/cgroup`
export const jobPath = `${ownPath}/job`
export const lowerPath = `${ownPath}/lower`
export const resultPath = `${ownPath}/result`
export const scratchPath = `${ownPath}/scratch`
export const upperPath = `${ownPath}/upper`
export const workPath = `${ownPath}/work`
