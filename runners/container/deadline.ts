/** What `promise` gives. Throws where it has not settled after so many ms; it goes on all the same, unheard. */
export async function inTime<T>(promise: Promise<T>, ms: number, what: string): Promise<T> {
  const overdue = Promise.withResolvers<never>()
  const timer = setTimeout(() => overdue.reject(new Error(`${what} took more than ${ms} ms`)), ms)
  promise.catch(() => {})
  try {
    return await Promise.race([promise, overdue.promise])
  } finally {
    clearTimeout(timer)
  }
}
