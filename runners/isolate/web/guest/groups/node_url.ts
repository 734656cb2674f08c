/** node:url: the web’s URL and what turns paths into file: URLs and back. */
const percent: Record<string, string> = {
  '%': '%25',
  '\\': '%5C',
  '\n': '%0A',
  '\r': '%0D',
  '\t': '%09',
  '?': '%3F',
  '#': '%23',
}

function pathToFileURL(path: string): URL {
  const url = new URL('file:///')
  url.pathname = (path.startsWith('/') ? path : `/${path}`).replace(
    /[%\\\n\r\t?#]/g,
    (char) => percent[char]!,
  )
  return url
}
function fileURLToPath(given: string | URL): string {
  const url = typeof given === 'string' ? new URL(given) : given
  if (url.protocol !== 'file:') throw new TypeError('The URL must be of scheme file')
  if (/%2f/i.test(url.pathname)) throw new TypeError('File URL path must not include encoded / characters')
  return decodeURIComponent(url.pathname)
}
function urlToHttpOptions(url: URL) {
  const { protocol, hostname, hash, search, pathname, href, port } = url
  return {
    protocol,
    hostname,
    hash,
    search,
    pathname,
    path: pathname + search,
    href,
    ...(port === '' ? {} : { port: Number(port) }),
  }
}
const host_ = (domain: string) => {
  try {
    return new URL(`ws://${domain}`).hostname
  } catch {
    return ''
  }
}

const names = {
  URL,
  URLSearchParams,
  domainToASCII: host_,
  domainToUnicode: (domain: string) => group('idna').toUnicode(host_(domain), {}).domain as string,
  fileURLToPath,
  format: (url: unknown) => `${url}`,
  pathToFileURL,
  urlToHttpOptions,
}
export const exports = { ...names, default: names }
