/** Calls of the Docker Engine API, each with a deadline: a daemon that hangs or is gone is an error, never a wait. */
import type { Socket } from 'node:net'
import type { Readable } from 'node:stream'
import { text } from 'node:stream/consumers'
import Docker from 'dockerode'
import { BoxError } from '../engine.ts'

/** How long (ms) the engine may take over what is usually done in a moment. */
export const answerMs = 10_000
/** So many times as long for making and starting a container, on a slow disk under load. */
const slowTimes = 3

const defaultSocket = '/var/run/docker.sock'

/** The engine refused or did not answer. */
export class ApiError extends BoxError {
  /** Of its HTTP answer; undefined: it gave none. */
  readonly status: number | undefined
  constructor(message: string, status: number | undefined, options?: ErrorOptions) {
    super('engine', message, options)
    this.status = status
  }
}

/**
 * Where the engine listens: `unix:///path`, or `tcp://` and `http://` on loopback, for the engine must see the files
 * of this host. Undefined: its usual socket. Throws `BoxError`.
 */
export function connectionOf(
  host: string | undefined,
): { socketPath: string } | { host: string; port: string } {
  if (host === undefined || host === '') return { socketPath: defaultSocket }
  if (host.startsWith('unix://')) return { socketPath: host.slice('unix://'.length) || defaultSocket }
  const url = URL.parse(host)
  if (url === null || !['tcp:', 'http:'].includes(url.protocol))
    throw new BoxError(
      'engine',
      `DOCKER_HOST ${host} is not usable: it must be unix:///path or tcp://127.0.0.1:port`,
    )
  if (!/^(localhost|127\.\d+\.\d+\.\d+|\[::1\])$/.test(url.hostname))
    throw new BoxError(
      'engine',
      `DOCKER_HOST ${host} is another host: the engine must see the files of this one`,
    )
  return { host: `http://${url.hostname}`, port: url.port || '2375' }
}

export class Api {
  readonly docker: Docker
  /** Milliseconds for most calls. */
  readonly answerMs: number

  /** For what takes longer. */
  readonly slowMs: number

  constructor(host: string | undefined, ms = answerMs) {
    this.answerMs = ms
    this.slowMs = slowTimes * ms
    // What is named here is not taken from the environment. No connection outlives its answer: one that was kept
    // may be closed by a restarted daemon at the moment it is used again.
    const named = { host: undefined, protocol: 'http', ca: undefined, cert: undefined, key: undefined }
    const options = { ...named, pathPrefix: '/', ...connectionOf(host), headers: { Connection: 'close' } }
    this.docker = new Docker(options as Docker.DockerOptions)
  }

  /** Throws `ApiError`: `what` failed, and why; after `ms` at the latest. */
  async call<T>(
    what: string,
    send: (abortSignal: AbortSignal) => Promise<T>,
    ms = this.answerMs,
  ): Promise<T> {
    const abort = new AbortController()
    const late = Promise.withResolvers<never>()
    const timer = setTimeout(() => {
      late.reject(new ApiError(`${what}: the Docker Engine did not answer within ${ms / 1000} s`, undefined))
      abort.abort()
    }, ms)
    try {
      return await Promise.race([send(abort.signal), late.promise])
    } catch (error) {
      throw error instanceof ApiError ? error : apiError(what, error)
    } finally {
      clearTimeout(timer)
    }
  }

  /**
   * A raw connection to the standard streams of a container. Its multiplexed output comes as it is; ending it ends
   * the container’s input. Throws `ApiError`.
   */
  attach(id: string): Promise<Socket> {
    // Not by `container.attach`, which sends its options as a body, too: what of it the engine has not read yet when
    // it lets go of HTTP would be input for the container.
    const query = { stream: '1', stdin: '1', stdout: '1', stderr: '1' }
    return this.call('attach to a container', (abortSignal) =>
      this.#post<Socket>(`/containers/${id}/attach?`, query, abortSignal, true),
    )
  }

  /**
   * The exit code of a container that was started, when it has one. Throws `ApiError`: the engine went away.
   * Not by `container.wait`, which never settles when the connection breaks.
   */
  async exitCode(id: string, abortSignal: AbortSignal): Promise<number> {
    try {
      const query = { condition: 'not-running' }
      const answer = await this.#post<Readable>(`/containers/${id}/wait?`, query, abortSignal, false)
      const abort = () => answer.destroy()
      abortSignal.addEventListener('abort', abort)
      try {
        return (JSON.parse(await text(answer)) as { StatusCode: number }).StatusCode
      } finally {
        abortSignal.removeEventListener('abort', abort)
      }
    } catch (error) {
      throw apiError('wait for a container', error)
    }
  }

  #post<T extends Readable>(
    path: string,
    query: Record<string, string>,
    abortSignal: AbortSignal,
    hijack: boolean,
  ): Promise<T> {
    return new Promise<T>((resolve, reject) => {
      const statusCodes = { 101: true, 200: true, 404: 'no such container', 500: 'server error' }
      const options = { _query: query, _body: {} }
      const request = { path, method: 'POST', hijack, isStream: true, options, statusCodes, abortSignal }
      this.docker.modem.dial(request as unknown as Dial, (error: unknown, answer: unknown) => {
        if (error) reject(error)
        else if (abortSignal.aborted) (answer as T).destroy()
        else resolve(answer as T)
      })
    })
  }
}

type Dial = Parameters<Docker['modem']['dial']>[0]

function apiError(what: string, error: unknown): ApiError {
  const { statusCode, json, message } = error as { statusCode?: number; json?: unknown; message?: string }
  const told = (json as { message?: string } | null | undefined)?.message ?? message ?? String(error)
  return new ApiError(`${what}: ${told.trim()}`, statusCode, { cause: error })
}
