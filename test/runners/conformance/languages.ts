/**
 * How each program of the suite is written: what a program does is said once, here above its name, and is the same in
 * every language that has it.
 */
import type { Runtime } from '../../../shared/workload.ts'

export interface Programs {
  /** Answers its input. */
  echo: string
  /** Answers how many bytes its input has as JSON (ASCII). */
  size: string
  /** Input n: answers a string of n times `x`. */
  text: string
  /** Answers `[MODE, TOKEN in base64]` of its environment. */
  env: string
  /** Writes the value of TOKEN to its log by every way there is, then fails with it in its last words. */
  tells: string
  /** Input n: writes `line 0` to `line n-1`, then answers n. */
  lines: string
  /** Input s, whole seconds: writes `begun`, waits s seconds, answers `woke`. */
  sleeps: string
  /** Writes `begun`, then keeps a core busy for ever. */
  spins: string
  /** Takes memory without end. */
  grows: string
  /** Handlers: throws `Error('no luck')` from a function named `inner`. */
  throws?: string
  /** Input n: ends its process with exit code n. */
  exits?: string
  /** Ignores SIGTERM, SIGINT and SIGHUP, writes `begun`, never ends. */
  deaf?: string
  /** `{ fetch }`: answers each piece of the body in capitals as it comes, status 201, the method in `x-method`. */
  http?: string
}

export interface Language {
  name: string
  programs: Programs
  /** What a spec needs beside the program; a command’s program is the file of an archive. */
  runtime?: Runtime
  command?: { file: string; argv: string[] }
}

const script = {
  echo: 'export default (input) => input',
  size: 'export default (input) => JSON.stringify(input).length',
  text: "export default (n) => 'x'.repeat(n)",
  lines: "export default (n) => { for (let i = 0; i < n; i++) console.log('line ' + i); return n }",
  sleeps: `export default async (s) => {
    console.log('begun')
    await new Promise((resolve) => setTimeout(resolve, s * 1000))
    return 'woke'
  }`,
  spins: "export default () => { console.log('begun'); for (;;); }",
  throws: "function inner() { throw new Error('no luck') }\nexport default () => inner()",
  http: `const capitals = () => new TransformStream({
    transform(piece, controller) {
      controller.enqueue(new TextEncoder().encode(new TextDecoder().decode(piece).toUpperCase()))
    },
  })
  export default {
    fetch: (request) => new Response(request.body.pipeThrough(capitals()), {
      status: 201, headers: { 'x-method': request.method },
    }),
  }`,
}

/** Of the isolate. */
export const javascript: Language = {
  name: 'javascript',
  runtime: 'javascript',
  programs: {
    ...script,
    env: 'export default (input, { env }) => [env.MODE, btoa(env.TOKEN)]',
    tells: `export default (input, { env, log }) => {
      console.log(env.TOKEN)
      console.error('error ' + env.TOKEN)
      log('log ' + env.TOKEN)
      throw new Error('about ' + env.TOKEN)
    }`,
    grows: 'export default () => { const all = []; for (;;) all.push({ n: all.length }) }',
  },
}

/** Of containers. */
export const node: Language = {
  name: 'node',
  runtime: 'node',
  programs: {
    ...script,
    env: 'export default () => [process.env.MODE, btoa(process.env.TOKEN)]',
    tells: `export default (input, { env, log }) => {
      console.log(process.env.TOKEN)
      console.error('error ' + process.env.TOKEN)
      log('log ' + env.TOKEN)
      process.stdout.write('raw ' + env.TOKEN + '\\n')
      process.stderr.write('raw ' + env.TOKEN + '\\n')
      throw new Error('about ' + env.TOKEN)
    }`,
    grows: 'export default () => { const all = []; for (;;) all.push(Buffer.alloc(2 ** 20, 1)) }',
    exits: 'export default (code) => { process.exit(code) }',
    deaf: `for (const signal of ['SIGTERM', 'SIGINT', 'SIGHUP']) process.on(signal, () => {})
      export default () => { console.log('begun'); return new Promise(() => setInterval(() => {}, 1000)) }`,
  },
}

export const python: Language = {
  name: 'python',
  runtime: 'python',
  programs: {
    echo: 'def handler(input, ctx):\n    return input\n',
    size: "import json\ndef handler(input, ctx):\n    return len(json.dumps(input, separators=(',', ':')))\n",
    text: "def handler(n, ctx):\n    return 'x' * n\n",
    env: `import base64, os
def handler(input, ctx):
    return [os.environ['MODE'], base64.b64encode(os.environ['TOKEN'].encode()).decode()]
`,
    tells: `import os, sys
def handler(input, ctx):
    token = os.environ['TOKEN']
    print(token)
    print('error ' + token, file=sys.stderr)
    os.write(1, ('raw ' + token + '\\n').encode())
    os.write(2, ('raw ' + token + '\\n').encode())
    raise ValueError('about ' + token)
`,
    lines: "def handler(n, ctx):\n    for i in range(n):\n        print('line', i)\n    return n\n",
    sleeps: "import time\ndef handler(s, ctx):\n    print('begun')\n    time.sleep(s)\n    return 'woke'\n",
    spins: "def handler(input, ctx):\n    print('begun')\n    while True:\n        pass\n",
    grows:
      'def handler(input, ctx):\n    all = []\n    while True:\n        all.append(bytes([1]) * 2**20)\n',
    throws: `def inner():
    raise ValueError('no luck')

def handler(input, ctx):
    return inner()
`,
    exits: 'import os\ndef handler(code, ctx):\n    os._exit(code)\n',
    deaf: `import signal, time
for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(name, signal.SIG_IGN)
def handler(input, ctx):
    print('begun')
    while True:
        time.sleep(1)
`,
  },
}

/** A command on the root that has a POSIX shell and coreutils: input on stdin, lines and result on stdout. */
export const shell: Language = {
  name: 'sh',
  command: { file: 'main.sh', argv: ['sh', 'main.sh'] },
  programs: {
    echo: 'cat\n',
    size: 'wc -c\n',
    text: 'head -c "$(cat)" /dev/zero | tr "\\0" x\n',
    env: 'printf \'["%s","%s"]\' "$MODE" "$(printf %s "$TOKEN" | base64 -w0)"\n',
    tells: 'echo "$TOKEN"; echo "error $TOKEN" >&2; exit 1\n',
    lines: `n=$(cat); i=0
while [ "$i" -lt "$n" ]; do echo "line $i"; i=$((i+1)); done
echo "$n" > "$VULCAN_RESULT"
`,
    sleeps: 'echo begun; sleep "$(cat)"; echo \'"woke"\' > "$VULCAN_RESULT"\n',
    spins: 'echo begun; while :; do :; done\n',
    grows: 'tail /dev/zero\n',
    exits: 'echo some words >&2; exit "$(cat)"\n',
    deaf: "trap '' TERM INT HUP; echo begun; while :; do sleep 1; done\n",
  },
}
