const encoder = new TextEncoder()

/** Server-Sent Events: one tick each `ms`, `count` of them; it stops when the reader goes away. */
export default {
  fetch(request: Request): Response {
    const { searchParams } = new URL(request.url)
    const count = Math.min(Number(searchParams.get('count') ?? 10), 1_000)
    const ms = Math.max(Number(searchParams.get('ms') ?? 1_000), 10)
    let sent = 0
    let timer: ReturnType<typeof setTimeout> | undefined
    const body = new ReadableStream<Uint8Array>({
      start(controller) {
        const stop = () => {
          clearTimeout(timer)
          console.log(`stopped after ${sent} ticks`)
        }
        request.signal.addEventListener('abort', stop)
        const tick = () => {
          sent++
          controller.enqueue(
            encoder.encode(`id: ${sent}\nevent: tick\ndata: ${new Date().toISOString()}\n\n`),
          )
          if (sent < count) timer = setTimeout(tick, ms)
          else controller.close()
        }
        tick()
      },
      cancel() {
        clearTimeout(timer)
      },
    })
    return new Response(body, {
      headers: { 'content-type': 'text/event-stream', 'cache-control': 'no-store' },
    })
  },
}
