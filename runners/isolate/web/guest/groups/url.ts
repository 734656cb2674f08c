/** URL and URLSearchParams, by whatwg-url. */
import * as urlInterface from 'whatwg-url/lib/URL.js'
import * as paramsInterface from 'whatwg-url/lib/URLSearchParams.js'

interface Installed {
  URL: typeof globalThis.URL
  URLSearchParams: typeof globalThis.URLSearchParams
}
const target = { Array, Object, Promise, String, TypeError } as unknown as Installed
urlInterface.install(target, ['Window'])
paramsInterface.install(target, ['Window'])

// In its own realm the package would have taken the iterators’ prototype from the global Array.
const { URL: WebURL, URLSearchParams: WebURLSearchParams } = target

export { WebURL as URL, WebURLSearchParams as URLSearchParams }
export const is = { URL: urlInterface.is, URLSearchParams: paramsInterface.is }
