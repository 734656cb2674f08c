/** What a cold isolate costs by itself: raw isolated-vm in this process. */
import ivm from 'isolated-vm'
import { type LoadResult, summarise } from './load.ts'

/** New isolate, context, module, call and disposal, one after the other, for about `seconds`. */
export function coldFloor(seconds: number): LoadResult {
  const latencies: number[] = []
  const start = performance.now()
  for (let n = 0; performance.now() < start + seconds * 1_000; n++) {
    const before = performance.now()
    const isolate = new ivm.Isolate({ memoryLimit: 128 })
    const context = isolate.createContextSync()
    const module = isolate.compileModuleSync(`export default ({ x }) => ({ y: x * 2, n: ${n} })`)
    module.instantiateSync(context, () => {
      throw new Error('no imports')
    })
    module.evaluateSync()
    const call = module.namespace.getSync('default', { reference: true })
    call.applySync(undefined, [{ x: 21 }], { arguments: { copy: true }, result: { copy: true } })
    isolate.dispose()
    latencies.push(performance.now() - before)
  }
  return summarise(latencies, (performance.now() - start) / 1_000, 0)
}
