/** 10⁶ conversations with hostile bytes: `npm run soak -- codec`. */
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { fuzz } from './fuzz.ts'

const cases = 1_000_000
const seed = Math.floor(Math.random() * 2 ** 31)

test(`${cases} conversations with hostile bytes, from seed ${seed}`, async () => {
  const { mostMb, grownMb } = await fuzz(seed, cases, (done) => {
    if (done % 100_000 === 0) console.log(`${done} cases`)
  })
  console.log(
    `${cases} cases from seed ${seed}: at most ${Math.round(mostMb)} MiB, in the end ${Math.round(grownMb)}`,
  )
  assert.ok(mostMb < 512, `${Math.round(mostMb)} MiB more`)
})

test.run()
