import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { TransientMap } from '../../shared/transient-map.ts'

test('it is a map, in order of insertion, and deleting gives what was there', () => {
  const map = new TransientMap<string, number>()
  for (const [n, key] of ['a', 'b', 'c'].entries()) map.set(key, n)
  map.set('a', 7)
  assert.equal(
    [...map],
    [
      ['a', 7],
      ['b', 1],
      ['c', 2],
    ],
  )
  assert.is(map.delete('b'), 1)
  assert.is(map.delete('b'), undefined)
  assert.equal([map.size, map.has('b'), map.get('b'), map.get('c')], [2, false, undefined, 2])
  assert.equal([...map.values()], [7, 2])
  map.clear()
  assert.equal([map.size, [...map]], [0, []])
})

test('what is deleted while somebody goes through it is passed over, the rest is seen once', () => {
  const map = new TransientMap<number, string>()
  for (let n = 0; n < 100; n++) map.set(n, String(n))
  const seen: number[] = []
  for (const [key] of map) {
    seen.push(key)
    map.delete(key)
    map.delete(key + 1)
  }
  assert.equal(
    seen,
    Array.from({ length: 50 }, (_, n) => n * 2),
  )
  assert.is(map.size, 0)
})

test.run()
