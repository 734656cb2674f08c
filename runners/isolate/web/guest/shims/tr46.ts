/** In front of the large tables of tr46: plain names, which are nearly all, need none of them. */
interface Options {
  checkHyphens?: boolean
  verifyDNSLength?: boolean
  useSTD3ASCIIRules?: boolean
}

const isPlain = (domain: string) => /^[\x00-\x7f]*$/.test(domain) && !/xn--/i.test(domain)

export function toASCII(domain: string, options: Options): string | null {
  const { checkHyphens, verifyDNSLength, useSTD3ASCIIRules } = options
  if (!checkHyphens && !verifyDNSLength && !useSTD3ASCIIRules && isPlain(domain)) return domain.toLowerCase()
  return group('idna').toASCII(domain, options)
}

export const toUnicode = (domain: string, options: Options): { domain: string; error: boolean } =>
  group('idna').toUnicode(domain, options)
