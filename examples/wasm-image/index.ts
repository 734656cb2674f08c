import { initWasm, Resvg } from '@resvg/resvg-wasm'
import wasm from '@resvg/resvg-wasm/index_bg.wasm'

const ready = initWasm(wasm)

/** A bar chart as PNG: `?values=3,1,4,1,5&width=480`. */
export default {
  async fetch(request: Request): Promise<Response> {
    const { searchParams } = new URL(request.url)
    const values = (searchParams.get('values') ?? '3,1,4,1,5,9,2,6').split(',').map(Number)
    const width = Number(searchParams.get('width') ?? 480)
    if (values.length > 100 || !values.every((value) => value >= 0) || !(width >= 16 && width <= 2_000))
      return new Response('values must be up to 100 numbers, width 16 to 2000\n', { status: 422 })
    await ready
    const image = new Resvg(chart(values), { fitTo: { mode: 'width', value: width } }).render()
    return new Response(image.asPng(), { headers: { 'content-type': 'image/png' } })
  },
}

function chart(values: number[]): string {
  const top = Math.max(...values, 1)
  const bars = values.map((value, i) => {
    const height = (value / top) * 90
    const hue = Math.round((i * 360) / values.length)
    return `<rect x="${i * 20 + 2}" y="${95 - height}" width="16" height="${height}" rx="2" fill="hsl(${hue}, 70%, 50%)"/>`
  })
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${values.length * 20} 100"><rect width="100%" height="100%" fill="#fff"/>${bars.join('')}</svg>`
}
