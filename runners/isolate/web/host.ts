/** Brings the bundle of web APIs into isolates, on the side of the sandbox child. */
import { readFileSync } from 'node:fs'
import type ivm from 'isolated-vm'
import type { WebBundle } from './bundle.ts'

/** A script of the bundle. */
interface Part {
  filename: string
  source: string
  /** V8’s code for it, made by us; in base64 until it is first used. */
  code: string | ivm.ExternalCopy<ArrayBuffer> | undefined
}

export class WebCode {
  /** How often V8 would not take the code that comes with the bundle: never, where the flags are those of `flags.ts`. */
  rejected = 0
  readonly #ivm: typeof ivm
  readonly #install: Part
  readonly #groups = new Map<string, Part>()

  /** `path` as `webBundle` gives it. Throws where it cannot be read. */
  constructor(isolatedVm: typeof ivm, path: string) {
    this.#ivm = isolatedVm
    const { install, groups, code = {} }: WebBundle = JSON.parse(readFileSync(path, 'utf8'))
    this.#install = { filename: 'vulcan:web', source: install, code: code[''] }
    for (const [name, source] of Object.entries(groups))
      this.#groups.set(name, { filename: `vulcan:web/${name}`, source, code: code[name] })
  }

  /** `{ install }` of the bundle, to be handed to guest code in the context. */
  install(isolate: ivm.Isolate, context: ivm.Context): ivm.Reference {
    return this.#run(isolate, context, this.#install)
  }

  /** What `Bridge.load` answers. Throws where there is no such group. */
  load(isolate: ivm.Isolate, context: ivm.Context, name: unknown): unknown {
    const part = this.#groups.get(String(name))
    if (part === undefined) throw new Error('no such group')
    return this.#run(isolate, context, part).derefInto({ release: true })
  }

  #run(isolate: ivm.Isolate, context: ivm.Context, part: Part): ivm.Reference {
    const { filename, source } = part
    if (typeof part.code === 'string') {
      const bytes = Uint8Array.from(Buffer.from(part.code, 'base64'))
      part.code = new this.#ivm.ExternalCopy(bytes.buffer)
    }
    const script = isolate.compileScriptSync(source, {
      filename,
      ...(part.code === undefined ? {} : { cachedData: part.code }),
    })
    if ((script as { cachedDataRejected?: boolean }).cachedDataRejected === true) this.rejected++
    const result = script.runSync(context, { reference: true }) as ivm.Reference
    script.release()
    return result
  }
}
