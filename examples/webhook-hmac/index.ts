const encoder = new TextEncoder()

interface Env {
  WEBHOOK_SECRET: string
}

/** Takes a POST whose `X-Signature-256: sha256=<hex>` is the HMAC of its body under the shared secret. */
export default {
  async fetch(request: Request, env: Env): Promise<Response> {
    if (request.method !== 'POST')
      return new Response('POST only\n', { status: 405, headers: { allow: 'POST' } })
    const given = /^sha256=([0-9a-f]{64})$/.exec(request.headers.get('x-signature-256') ?? '')?.[1]
    const body = new Uint8Array(await request.arrayBuffer())
    if (given === undefined || !(await verify(env.WEBHOOK_SECRET, fromHex(given), body))) {
      console.warn('refused a call with a wrong signature')
      return Response.json({ error: 'wrong signature' }, { status: 401 })
    }
    const event = JSON.parse(new TextDecoder().decode(body))
    console.log(`took ${event.type}`)
    return Response.json({ received: event.type })
  },
}

/** In constant time: `crypto.subtle.verify` compares. */
async function verify(secret: string, signature: Uint8Array<ArrayBuffer>, body: Uint8Array<ArrayBuffer>) {
  const algorithm = { name: 'HMAC', hash: 'SHA-256' }
  const key = await crypto.subtle.importKey('raw', encoder.encode(secret), algorithm, false, ['verify'])
  return await crypto.subtle.verify('HMAC', key, signature, body)
}

const fromHex = (hex: string): Uint8Array<ArrayBuffer> =>
  Uint8Array.from(hex.match(/../g) ?? [], (byte) => Number.parseInt(byte, 16))
