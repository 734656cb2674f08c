/** A network could not be opened; the message says why, and names the entry of the policy where one is at fault. */
export class NetworkError extends Error {
  override name = 'NetworkError'
  /** `user`: the policy names what cannot be had, however often it is tried; `engine`: anything else. */
  readonly fault: 'user' | 'engine'
  constructor(fault: NetworkError['fault'], message: string, options?: ErrorOptions) {
    super(message, options)
    this.fault = fault
  }
}

/** This host cannot give networks at all. */
export class NetworksUnavailable extends Error {
  override name = 'NetworksUnavailable'
  /** What would bring them. */
  readonly fix: string
  constructor(message: string, fix: string, options?: ErrorOptions) {
    super(message, options)
    this.fix = fix
  }
}
