import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { parsePrefer } from '../../gateway/prefer.ts'
import { route } from '../../gateway/routing.ts'
import type { Backend, Capabilities } from '../../shared/backends.ts'
import type { Problem } from '../../shared/errors.ts'
import { type Isolation, WorkloadSpec } from '../../shared/workload.ts'

const can: Record<Isolation, Capabilities['runtimes']> = {
  isolate: ['javascript', 'typescript'],
  gvisor: ['oci', 'node', 'python', 'go', 'javascript', 'typescript'],
  docker: ['oci', 'node', 'python', 'go', 'javascript', 'typescript'],
  microvm: ['oci', 'node', 'python', 'go', 'javascript', 'typescript'],
}

/** Backends of which only `names` are available. */
const available =
  (...names: Isolation[]) =>
  (isolation: Isolation): Backend =>
    names.includes(isolation)
      ? {
          isolation,
          available: true,
          reason: null,
          fix: null,
          capabilities: {
            runtimes: can[isolation],
            egress: isolation === 'isolate' ? ['none'] : ['none', 'all'],
            walls: [],
            missing: [],
            version: '1',
          },
          runners: [],
        }
      : {
          isolation,
          available: false,
          reason: 'not here',
          fix: 'install it',
          capabilities: null,
          runners: [],
        }

const all = available('isolate', 'gvisor', 'docker', 'microvm')
const digest = `sha256:${'0'.repeat(64)}`
const choose = (spec: Record<string, unknown>, backends = all) => route(WorkloadSpec.parse(spec), backends)

function refusal(spec: Record<string, unknown>, backends = all): Problem {
  try {
    choose(spec, backends)
  } catch (error) {
    return error as Problem
  }
  throw new Error('it was not refused')
}

test('auto takes the lightest isolation that is strong enough, and says why', () => {
  const expected: [Record<string, unknown>, Isolation, RegExp][] = [
    [{ code: 'x' }, 'isolate', /^auto: JavaScript/],
    [{ code: 'x', runtime: 'typescript' }, 'isolate', /^auto: TypeScript/],
    [{ code: 'x', runtime: 'python' }, 'microvm', /^auto: python/],
    [{ image: 'host/name:1' }, 'gvisor', /^auto: an image/],
    [{ archive: { blob: digest } }, 'microvm', /^auto: an archive/],
    ...['node', 'python', 'go', 'javascript', 'typescript', 'oci'].map(
      (runtime): [Record<string, unknown>, Isolation, RegExp] => [
        { archive: { blob: digest }, runtime, limits: { memory_mb: 64 } },
        'microvm',
        /^auto: an archive runs in a microvm$/,
      ],
    ),
    [{ archive: { blob: digest }, entrypoint: ['./app'] }, 'microvm', /^auto: an archive/],
    [{ code: 'x', runtime: 'go' }, 'microvm', /^auto: go source/],
    [{ code: 'x', entrypoint: 'main.py' }, 'microvm', /^auto: python/],
    [{ code: 'x', entrypoint: 'index.ts' }, 'isolate', /^auto: TypeScript/],
    [{ code: 'x', entrypoint: ['sh', 'x'] }, 'microvm', /^auto: a command/],
    [{ image: 'host/name:1', runtime: 'python', entrypoint: 'a.py' }, 'gvisor', /^auto: an image/],
  ]
  for (const [spec, isolation, reason] of expected) {
    const found = choose(spec)
    assert.is(found.isolation, isolation)
    assert.match(found.reason, reason)
  }
})

test('auto is never weakened: what it would take is refused where that is unavailable', () => {
  const problem = refusal({ image: 'host/name:1' }, available('isolate', 'docker'))
  assert.is(problem.code, 'isolation_unavailable')
  assert.is(problem.field, 'isolation')
  assert.match(problem.message, 'gvisor is unavailable: not here; install it')
  assert.match(problem.message, 'docker could run it')
  assert.not.match(problem.message, 'isolate could')
  const archive = { archive: { blob: digest }, runtime: 'python' }
  const weaker = refusal(archive, available('isolate', 'gvisor', 'docker'))
  assert.match(
    weaker.message,
    /^microvm is unavailable: not here; install it; gvisor and docker could run it: name one in "isolation"/,
  )
  const listed = choose({ ...archive, isolation: ['microvm', 'gvisor'] }, available('gvisor'))
  assert.equal(listed, {
    isolation: 'gvisor',
    reason: 'preferred: gvisor is choice 2 of 2; passed over: microvm is unavailable: not here; install it',
  })
  const nobody = refusal({ image: 'host/name:1' }, available('isolate'))
  assert.not.match(nobody.message, 'could run it')
})

test('an isolate takes no archive, image, command, folder or user', () => {
  const wrong: [Record<string, unknown>, string][] = [
    [{ archive: { blob: digest }, runtime: 'javascript' }, 'not an archive'],
    [{ image: 'host/name:1' }, 'not an image'],
    [{ code: 'x', entrypoint: ['node', 'x'] }, 'no command'],
    [{ code: 'x', working_dir: '/tmp' }, 'working_dir'],
    [{ code: 'x', user: '1000' }, 'no users'],
  ]
  for (const [spec, words] of wrong) {
    assert.match(refusal({ ...spec, isolation: 'isolate' }).message, words)
    assert.is(choose({ ...spec, isolation: ['isolate', 'docker'] }).isolation, 'docker')
  }
})

test('a named isolation is taken, or refused with what would make it available', () => {
  assert.equal(choose({ code: 'x', isolation: 'microvm' }), {
    isolation: 'microvm',
    reason: 'requested: microvm',
  })
  assert.match(refusal({ code: 'x', isolation: 'docker' }, available('isolate')).message, 'install it')
})

test('a list is taken in its order; what was passed over is told', () => {
  const spec = { code: 'x', isolation: ['microvm', 'isolate'] }
  assert.equal(choose(spec), { isolation: 'microvm', reason: 'preferred: microvm is choice 1 of 2' })
  const second = choose(spec, available('isolate'))
  assert.is(second.isolation, 'isolate')
  assert.match(second.reason, /^preferred: isolate is choice 2 of 2; passed over: microvm is unavailable/)
  const problem = refusal(spec, available('gvisor'))
  assert.match(problem.message, /microvm is unavailable.*isolate is unavailable/)
})

test('an isolation that cannot run the runtime or the egress asked for is refused', () => {
  assert.match(refusal({ code: 'x', isolation: 'isolate', runtime: 'python' }).message, 'not python')
  assert.match(refusal({ code: 'x', network: { egress: 'all' } }).message, 'not all')
  assert.match(refusal({ code: 'x', network: { egress: ['a.example:443'] } }).message, 'not allowlist')
  assert.is(
    choose({ code: 'x', isolation: ['isolate', 'gvisor'], network: { egress: 'all' } }).isolation,
    'gvisor',
  )
})

test('Prefer: wait and respond-async, in any order and spelling', () => {
  const expected: [string | undefined, number | undefined, string | undefined][] = [
    [undefined, undefined, undefined],
    ['wait=5', 5, 'wait=5'],
    ['Wait = "7"', 7, 'wait=7'],
    ['wait=0.5', 0.5, 'wait=0.5'],
    ['respond-async', 0, 'respond-async'],
    ['respond-async, wait=3', 3, 'respond-async, wait=3'],
    ['wait=3, respond-async', 3, 'wait=3, respond-async'],
    ['wait=3; because=now', 3, 'wait=3'],
    ['return=minimal', undefined, undefined],
    ['', undefined, undefined],
  ]
  for (const [header, waitS, applied] of expected)
    assert.equal(parsePrefer(header), { waitS, applied }, header)
})

test('a wait that is no number of seconds is refused', () => {
  for (const header of [
    'wait',
    'wait=',
    'wait=""',
    'wait=soon',
    'wait=-1',
    'wait=Infinity',
    'wait=1e3',
    'wait=0x10',
  ])
    assert.throws(
      () => parsePrefer(header),
      (error: Problem) => error.code === 'invalid_header' && error.field === 'Prefer',
      header,
    )
})

test('a runner without a network refuses egress with what brings one', () => {
  const microvm = available('microvm')('microvm')
  const alone = {
    ...microvm,
    capabilities: {
      ...microvm.capabilities!,
      egress: ['none' as const],
      missing: [{ wall: 'network', fix: 'run as root' }],
    },
  }
  const spec = { archive: { blob: digest }, network: { egress: 'all' } }
  assert.match(
    refusal(spec, (isolation) => (isolation === 'microvm' ? alone : available()(isolation))).message,
    'microvm offers egress none, not all: run as root',
  )
})

test('a runtime that a runner lacks is refused with what brings it', () => {
  const gvisor = available('gvisor')('gvisor')
  const bare = {
    ...gvisor,
    capabilities: {
      ...gvisor.capabilities!,
      runtimes: ['oci' as const],
      missing: [{ wall: 'runtime python', fix: 'npm run setup -- gvisor builds it' }],
    },
  }
  const spec = WorkloadSpec.parse({ code: 'x', isolation: 'gvisor', runtime: 'python' })
  assert.throws(
    () => route(spec, () => bare),
    (error: Error) =>
      error.message.includes('gvisor runs oci here, not python: npm run setup -- gvisor builds it'),
  )
})

test.run()
