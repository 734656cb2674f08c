/** What the folds of both streams do with a message’s bytes. */

const decoder = new TextDecoder('utf-8', { fatal: true })

/** The JSON in the bytes; undefined where there is none. */
export function parseJson(bytes: Uint8Array): unknown {
  try {
    return JSON.parse(decoder.decode(bytes))
  } catch {
    return undefined
  }
}

/** Calls through at most ten times a minute: one bad publisher must not fill the disk by way of the log. */
export function rarely<A extends unknown[]>(say: (...args: A) => void): (...args: A) => void {
  let since = 0
  let said = 0
  return (...args) => {
    const now = Date.now()
    if (now - since > 60_000) {
      since = now
      said = 0
    }
    if (said++ < 10) say(...args)
  }
}
