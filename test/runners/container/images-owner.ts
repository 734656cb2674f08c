/**
 * A process with an image store of its own: `images-owner.ts <dir> <reference> [<budget in MiB>]`. Gets the image and
 * its root, prints them as a line of JSON, and holds the image until its standard input ends.
 */
import { text } from 'node:stream/consumers'
import { openImageStore } from '../../../runners/container/images/store.ts'
import { storeOptions } from './images-support.ts'

const [dir, reference, budget] = process.argv.slice(2)
const options = storeOptions(dir!, budget === undefined ? {} : { budgetMb: Number(budget) })
await using store = await openImageStore(options)
using image = await store.get({ kind: 'reference', reference: reference! }, AbortSignal.timeout(60_000))
console.log(JSON.stringify({ digest: image.digest, root: await image.root() }))
await text(process.stdin)
