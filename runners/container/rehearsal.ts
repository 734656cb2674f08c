/**
 * Runs of small programs that nobody sent, before a snapshot of a box is taken: so that loaders and compilers, JSON,
 * streams and what a handler is called with are in memory already when the first real run comes. Nothing of them may
 * draw random numbers, which every copy of the snapshot would draw again.
 */

import { createHash } from 'node:crypto'
import { mkdir, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import type { Box } from './engine.ts'
import { Shim } from './handler.ts'
import { inBox, type RunHeader } from './protocol.ts'

/** Where their files are while they run: no directory of a job’s is ever there. */
const stage = '/tmp/.rehearsal'
/** One that takes longer is given up, with its box, ms. */
const rehearsalMs = 60_000

interface Program {
  files: Record<string, string>
  /** Null: looked for, as most often. */
  entry: string | null
  input?: string
  request?: { method: string; url: string; headers: [string, string][]; body?: string }
}

const common = `
const found = { list: [1, 2.5, 'three', null, { deep: true }], text: 'é'.repeat(3), at: new Date(0).toISOString() }
const text = JSON.stringify(JSON.parse(JSON.stringify(found)))
const bytes = new TextEncoder().encode(text)
const again = new TextDecoder().decode(bytes)
const words = new Map(again.split(/[",:]+/).map((word, i) => [word, i]))
const sorted = [...words].sort(([a], [b]) => (a < b ? -1 : 1)).map(([word]) => word)
`

const asked = {
  method: 'POST',
  url: 'http://localhost/a?b=c',
  headers: [['content-type', 'application/json']],
} as const

const programs: Record<'node' | 'python', Program[]> = {
  node: [
    {
      files: {
        'index.mjs': `import { part } from './part.mjs'
import { readFileSync } from 'node:fs'
import { createHash } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
${common}
export default async (input, ctx) => {
  console.log('line %d', 1, { a: [1] }); console.error(new Error('none')); ctx.log.warn('warns')
  await sleep(1)
  await Promise.all([1, 2].map(async (n) => n))
  const hash = createHash('sha256').update(bytes).digest('hex')
  return { input, part: part(2), sorted, hash, size: readFileSync(import.meta.filename ?? '/dev/null').length }
}`,
        'part.mjs': 'export const part = (n) => n * 2\n',
      },
      entry: 'index.mjs',
      input: '{"n":1,"list":[1,2,3],"text":"é"}',
    },
    {
      files: {
        'index.js': `const { join } = require('node:path')
const part = require('./part.js')
module.exports = (input) => ({ joined: join('/a', 'b'), part: part(input.n), url: new URL('http://a.test/b?c=d').search })`,
        'part.js': 'module.exports = (n) => n + 1\n',
        'package.json': '{"name":"rehearsal","main":"index.js"}',
      },
      entry: 'index.js',
      input: '{"n":1}',
    },
    {
      files: { 'index.js': 'export default (input) => { throw new TypeError(input) }\n' },
      entry: 'index.js',
      input: '"luck"',
    },
    {
      files: { 'index.ts': 'interface N { n: number }\nexport default ({ n }: N): number => n + 1\n' },
      entry: 'index.ts',
      input: '{"n":1}',
    },
    {
      files: {
        'worker.mjs': `${common}
export default {
  async fetch(request, env, ctx) {
    const headers = new Headers({ 'x-a': 'b' })
    const body = await request.json()
    const data = await (await fetch('data:application/json,%7B%22a%22%3A1%7D')).json()
    ctx.waitUntil(Promise.resolve())
    return Response.json({ url: new URL(request.url).pathname, body, data, sorted }, { headers })
  },
}`,
      },
      entry: 'worker.mjs',
      request: {
        ...asked,
        headers: [...asked.headers.map(([a, b]): [string, string] => [a, b])],
        body: '{"a":1}',
      },
    },
    {
      files: { 'worker.mjs': 'export default { fetch: async (r) => new Response(await r.text()) }\n' },
      entry: 'worker.mjs',
      input: '{"a":1}',
    },
  ],
  python: [
    {
      files: {
        'main.py': `import base64, collections, dataclasses, datetime, functools, hashlib, io, itertools, json, math, os, re, time, typing, urllib.parse
import part

@dataclasses.dataclass
class Found:
    name: str
    at: float

def handler(input, ctx):
    print('line', 1)
    ctx.log.warn('warns')
    found = Found('a', math.sqrt(2))
    words = sorted(re.findall(r'[a-z]+', json.dumps(input)))
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(found)).encode()).hexdigest()
    return {'input': input, 'part': part.twice(2), 'words': words, 'digest': digest, 'at': datetime.datetime.fromtimestamp(0).isoformat()}
`,
        'part.py': 'def twice(n):\n    return n * 2\n',
      },
      entry: 'main.py',
      input: '{"n":1,"list":[1,2,3],"text":"é"}',
    },
    {
      files: {
        'main.py':
          'import asyncio\nasync def handler(input, ctx):\n    await asyncio.sleep(0)\n    return input\n',
      },
      entry: 'main.py',
      input: '1',
    },
    {
      files: { 'main.py': "def handler(input, ctx):\n    raise ValueError('no luck')\n" },
      entry: 'main.py',
      input: '1',
    },
  ],
}

/** Of what a rehearsed box has in memory, apart from the shim’s own text. */
export const rehearsalKey = (language: 'node' | 'python'): string =>
  createHash('sha256')
    .update(JSON.stringify([programs[language], rehearsalPlaces]))
    .digest('hex')
    .slice(0, 16)

/** What most handlers are made of, under the name that code gets, and a look into the place of a job’s files. */
const again: Record<'node' | 'python', Program & { input: string }> = {
  node: {
    files: {
      'index.mjs': `// Sums.
export default async ({ n, list, text }, ctx) => {
  const total = list.reduce((sum, each) => sum + each * n + 1, 0) * 2
  return { total, text: \`\${text}\${ctx.id}\`, found: existsSync('${inBox.workspace}/none') }
}
import { existsSync } from 'node:fs'
`,
    },
    entry: null,
    input: '{"n":1,"list":[1,2,3],"text":"é"}',
  },
  python: {
    files: {
      'main.py': `import os

def handler(input, ctx):
    total = sum(each * input['n'] for each in input['list'])
    return {'total': total, 'text': f"{input['text']}{ctx.id}", 'found': os.path.exists('${inBox.workspace}/none')}
`,
    },
    entry: null,
    input: '{"n":1,"list":[1,2,3],"text":"é"}',
  },
}

/** Of `rehearseAgain`: modules are kept by their names, so each has its own. */
const rounds = ['1', '2']
const placeOf = (round: string) => `${inBox.rehearsal}/${round}`

/** Directories that `rehearseAgain` lays files into, as a job’s lie in one that was there before. */
export const rehearsalPlaces: readonly string[] = rounds.map(placeOf)

/** The first real run brings its own, drawn then. */
const seedOfNothing = '00'.repeat(32)

/** Starts a box whose process is a shim, and brings it where it has nothing left to learn. Throws where it dies. */
export async function rehearse(box: Box, language: 'node' | 'python'): Promise<void> {
  const shim = new Shim(box, () => void box.kill())
  await inTime(box, async () => {
    await box.start()
    if (!(await shim.ready)) throw gone(shim)
    // Twice: what is called for the second time is compiled.
    for (const round of [1, 2])
      for (const [i, program] of programs[language].entries())
        await perform(shim, program, `${stage}-${round}-${i}`)
  })
}

/** A directory in `dir` with what `rehearseAgain` runs. */
export async function writeRehearsal(dir: string, language: 'node' | 'python'): Promise<string> {
  const directory = join(dir, `rehearsal-${language}`)
  for (const round of rounds) {
    const place = join(directory, round)
    await mkdir(place, { recursive: true })
    for (const [name, text] of Object.entries(again[language].files)) await writeFile(join(place, name), text)
  }
  return directory
}

/**
 * What a first run does whatever its code, for a box that was resumed: what an emulator has translated is in no
 * snapshot, and what it translates is memory of this machine alone. `directory` is of `writeRehearsal`: its files come
 * as those of a job do, and are read from where those are.
 */
export async function rehearseAgain(
  box: Box,
  shim: Shim,
  language: 'node' | 'python',
  directory: string,
): Promise<void> {
  await inTime(box, async () => {
    const { entry, input } = again[language]
    for (const round of rounds) {
      await box.provide?.(join(directory, round), placeOf(round))
      await perform(shim, { files: {}, entry, input }, placeOf(round), seedOfNothing)
    }
  })
}

async function inTime(box: Box, work: () => Promise<void>): Promise<void> {
  const timer = setTimeout(() => void box.kill(), rehearsalMs)
  try {
    await work()
  } finally {
    clearTimeout(timer)
  }
}

function perform(
  shim: Shim,
  { files, entry, input, request }: Program,
  root: string,
  seed?: string,
): Promise<void> {
  const header: Omit<RunHeader, 'mark'> = {
    ...{ root, entry, rehearsal: files, ...(seed === undefined ? {} : { seed }) },
    ...{ output_bytes: 1_048_576, inline_bytes: 65_536 },
  }
  const ctx = JSON.stringify({ id: '', attempt: 1, traceparent: null, env: {} })
  const { body, ...head } = request ?? {}
  const entered =
    request === undefined
      ? undefined
      : { head: JSON.stringify(head), body: body === undefined ? undefined : Buffer.from(body) }
  return new Promise((resolve, reject) =>
    shim.start(
      {
        onLine() {},
        onMessage() {},
        onDone: () => resolve(),
        onGone: () => reject(gone(shim)),
      },
      header,
      ctx,
      input,
      entered,
    ),
  )
}

function gone(shim: Shim): Error {
  const { exit, stderr = '', protocol } = shim.gone ?? {}
  return new Error(
    `the runtime could not be made ready (exit code ${exit?.code}): ${protocol ?? exit?.reason ?? stderr.slice(-500)}`,
  )
}
