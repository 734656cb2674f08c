/** Deploys source code under a name; throws what the gateway refused. */
import { http } from '../test/platform.ts'

export async function deployCode(url: string, name: string, code: string): Promise<void> {
  const { status, body } = await http(`${url}/v1/functions/${name}`, { method: 'PUT', body: { code } })
  if (status >= 300) throw new Error(`deploying ${name} was answered ${status}: ${JSON.stringify(body)}`)
}
