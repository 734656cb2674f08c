/**
 * What the runtime images are made of. Their key holds this file's digest: whatever is changed here has them built
 * anew by the next set-up.
 */
import { execFile } from 'node:child_process'
import { existsSync, globSync } from 'node:fs'
import { chmod, copyFile, mkdir, mkdtemp, readFile, rm, symlink, writeFile } from 'node:fs/promises'
import { basename, dirname, join } from 'node:path'
import { promisify } from 'node:util'
import type { RuntimeName } from './index.ts'

const execute = promisify(execFile)

/** Suites that the packages come from, whatever the machine itself runs. */
export const suites = ['bookworm', 'bookworm-updates', 'bookworm-security', 'bookworm-backports']

export type RecipeInputs = {
  /** Node's binary, of the version that the runners have. */
  nodeBinary: string
  /** The unpacked base image, for what runs a program of the image while it is built; not to be changed. */
  base(): Promise<string>
}

export type Recipe = {
  /** Debian packages, unpacked in this order. Their dependencies are named here too. */
  packages: readonly string[]
  /** What else is left out of the packages, as tar's patterns. */
  exclude: readonly string[]
  env: Readonly<Record<string, string>>
  cmd: string[]
  /** What the packages' own scripts would do, and what Debian does not have. Runs without root. */
  finish(root: string, inputs: RecipeInputs): Promise<void>
}

/** Nobody reads it in a sandbox, or nothing there can use it. */
const exclude = [
  ...[
    'bash-completion',
    'bug',
    'debconf',
    'doc',
    'doc-base',
    'info',
    'lintian',
    'locale',
    'man',
    'menu',
    'pixmaps',
  ].map((name) => `./usr/share/${name}`),
  ...['applications', 'binfmts', 'common-licenses', 'gdb', 'perl5'].map((name) => `./usr/share/${name}`),
  ...['cron.d', 'cron.daily', 'default', 'init.d', 'logrotate.d', 'pam.d', 'systemd', 'update-motd.d'].map(
    (name) => `./etc/${name}`,
  ),
  ...[
    './lib/systemd',
    './usr/lib/systemd',
    './etc/rmt',
    './usr/games',
    './usr/src',
    './usr/include',
    './var',
    './boot',
    './home',
    './media',
  ],
  // Other character sets than Unicode's, and what only a linker reads.
  ...['./lib/*/gconv', './usr/lib/*/gconv', './usr/lib/*/audit', '*.a', '*.la'],
  ...['./usr/share/zoneinfo/posix', './usr/share/zoneinfo/right'],
]

/** BusyBox's programs for what no package of the base image brings. */
const applets = [
  ...[
    'bc',
    'clear',
    'free',
    'hexdump',
    'hostname',
    'ip',
    'kill',
    'less',
    'nc',
    'nslookup',
    'patch',
    'ping',
    'ps',
  ],
  ...['pgrep', 'pkill', 'setsid', 'strings', 'top', 'tree', 'unzip', 'vi', 'watch', 'wget', 'which', 'xxd'],
]

const base: Recipe = {
  packages: [
    ...['base-files', 'libc6', 'libc-bin', 'libgcc-s1', 'libstdc++6', 'libatomic1', 'zlib1g'],
    ...['dash', 'coreutils', 'libacl1', 'libattr1', 'libgmp10', 'libselinux1', 'libpcre2-8-0'],
    ...['sed', 'grep', 'mawk', 'findutils', 'diffutils', 'tar', 'gzip', 'busybox-static'],
    ...['ca-certificates', 'netbase', 'tzdata'],
  ],
  exclude,
  env: {
    PATH: '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin',
    HOME: '/tmp',
    LANG: 'C.UTF-8',
  },
  cmd: ['/bin/sh'],
  async finish(root) {
    for (const [path, target] of [
      ['usr/bin/sh', 'dash'],
      ['usr/bin/awk', 'mawk'],
      ['etc/localtime', '/usr/share/zoneinfo/Etc/UTC'],
      ['etc/mtab', '/proc/mounts'],
      ['var/run', '/run'],
      ['var/lock', '/run/lock'],
      ['usr/lib/ssl/cert.pem', '/etc/ssl/certs/ca-certificates.crt'],
      ...applets.map((name) => [`usr/bin/${name}`, 'busybox'] as const),
    ] as const)
      if (!existsSync(join(root, path))) await link(join(root, path), target)
    const certificates = globSync('usr/share/ca-certificates/mozilla/*.crt', { cwd: root }).sort()
    const texts = await Promise.all(certificates.map((path) => readFile(join(root, path), 'utf8')))
    await rm(join(root, 'usr/share/ca-certificates'), { recursive: true })
    await put(root, {
      'etc/ssl/certs/ca-certificates.crt': texts.join(''),
      'etc/passwd': 'root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/tmp:/bin/sh\n',
      'etc/group': 'root:x:0:\nnogroup:x:65534:\n',
      'etc/nsswitch.conf':
        'passwd: files\ngroup: files\nhosts: files dns\nservices: files\nprotocols: files\n',
      'etc/timezone': 'Etc/UTC\n',
      // Replaced by the box's own.
      'etc/hostname': 'vulcan\n',
      'etc/hosts': '127.0.0.1 localhost\n::1 localhost\n',
      'etc/resolv.conf': '',
    })
    // The root is read-only: whatever is mounted into it needs its place.
    for (const path of ['.vulcan', 'dev', 'proc', 'root', 'run', 'sys', 'tmp', 'var/tmp', 'workspace'])
      await mkdir(join(root, path), { recursive: true })
    for (const path of ['tmp', 'var/tmp']) await chmod(join(root, path), 0o1777)
    await chmod(join(root, 'root'), 0o700)
  },
}

const node: Recipe = {
  packages: [],
  exclude,
  env: { ...base.env, NODE_ENV: 'production' },
  cmd: ['/usr/local/bin/node'],
  async finish(root, { nodeBinary }) {
    const target = join(root, 'usr/local/bin/node')
    await mkdir(dirname(target), { recursive: true })
    await copyFile(nodeBinary, target)
    await chmod(target, 0o755)
  },
}

const pythonVersion = '3.11'
const pythonLibrary = `./usr/lib/python${pythonVersion}`

const python: Recipe = {
  packages: [
    ...[`libpython${pythonVersion}-minimal`, `libpython${pythonVersion}-stdlib`],
    ...[`python${pythonVersion}-minimal`, 'python3-minimal', 'python3-pip-whl'],
    ...['libbz2-1.0', 'libdb5.3', 'libexpat1', 'libffi8', 'liblzma5', 'libncursesw6', 'libreadline8'],
    ...['libsqlite3-0', 'libssl3', 'libtinfo6', 'libuuid1', 'libcrypt1'],
  ],
  exclude: [
    ...exclude,
    ...['pydoc_data', 'test', 'turtle.py', 'antigravity.py', 'EXTERNALLY-MANAGED'].map(
      (name) => `${pythonLibrary}/${name}`,
    ),
    `${pythonLibrary}/sitecustomize.py`,
    // NIS needs four more libraries and a NIS server.
    ...['nis', '_test*', '_ctypes_test', '_xxtestfuzz', 'xxlimited*'].map(
      (name) => `${pythonLibrary}/lib-dynload/${name}.*`,
    ),
    ...['py3clean', 'py3compile', 'py3versions'].map((name) => `./usr/bin/${name}`),
    './usr/share/python3',
    './usr/lib/binfmt.d',
  ],
  env: { ...base.env, PYTHONUNBUFFERED: '1', PYTHONDONTWRITEBYTECODE: '1', PYTHONIOENCODING: 'utf-8' },
  cmd: ['/usr/bin/python3'],
  async finish(root, { base }) {
    await link(join(root, 'usr/bin/python'), 'python3')
    await mkdir(join(root, 'usr/lib/python3/dist-packages'), { recursive: true })
    await compilePython(root, await base())
  },
}

/**
 * Bytecode for the standard library: the root is read-only, so that every start would compile what it imports. The
 * interpreter is the image's own, run where it lies, with the loader and the libraries of the images.
 */
async function compilePython(root: string, base: string): Promise<void> {
  const [loader] = globSync('usr/lib/*-linux-gnu*/ld-linux-*.so.*', { cwd: base })
  if (loader === undefined) throw new Error('the base image has no loader')
  const library = dirname(loader)
  const paths = [join(base, library), join(root, library)].join(':')
  const compile = [
    '-m',
    'compileall',
    '-q',
    '-f',
    '-s',
    root,
    '-p',
    '/',
    '--invalidation-mode',
    'unchecked-hash',
  ]
  await execute(
    join(base, loader),
    [
      ...['--library-path', paths, join(root, `usr/bin/python${pythonVersion}`), '-S'],
      ...[...compile, join(root, pythonLibrary)],
    ],
    {
      env: {
        PYTHONHOME: join(root, 'usr'),
        // The order of sets in bytecode follows the seed.
        PYTHONHASHSEED: '0',
        // What it imports itself must not get bytecode with the paths and times of this build.
        PYTHONDONTWRITEBYTECODE: '1',
      },
      timeout: 300_000,
      maxBuffer: 16 << 20,
    },
  )
}

const goVersion = '1.23'
const goRoot = `usr/lib/go-${goVersion}`
/** Compiled packages of the standard library, which each build takes over by links. */
const goCache = `${goRoot}/cache`
const goEnv = {
  CGO_ENABLED: '0',
  GOFLAGS: '-trimpath -buildvcs=false',
  GOPROXY: 'off',
  GOSUMDB: 'off',
  GOTELEMETRY: 'off',
  GOTOOLCHAIN: 'local',
}

const go: Recipe = {
  packages: [`golang-${goVersion}-go/bookworm-backports`, `golang-${goVersion}-src/bookworm-backports`],
  exclude: [
    ...exclude,
    ...['api', 'misc', 'test', 'src/cmd'].map((name) => `./usr/share/go-${goVersion}/${name}`),
    ...['api', 'misc', 'test'].map((name) => `./${goRoot}/${name}`),
    // What no build without C uses.
    ...[
      'addr2line',
      'cgo',
      'cov*',
      'dist*',
      'doc',
      'fix',
      'nm',
      'objdump',
      'pprof',
      'preprofile',
      'test2json',
    ]
      .concat('trace', 'vet')
      .map((name) => `./${goRoot}/pkg/tool/*/${name}`),
    ...['*/testdata', '*_test.go'].map((name) => `./usr/share/go-${goVersion}/src/${name}`),
  ],
  env: { ...base.env, ...goEnv, GOCACHE: '/tmp/go-cache', GOPATH: '/tmp/go' },
  cmd: ['/bin/sh'],
  async finish(root) {
    await compileGo(root)
    const script = join(root, 'usr/local/bin/go')
    await put(root, { 'usr/local/bin/go': goScript })
    await chmod(script, 0o755)
  },
}

/** Go's cache must be writable: links to what is compiled here, so that only what is new is built and takes memory. */
const goScript = `#!/bin/sh
if [ -n "$GOCACHE" ] && [ ! -e "$GOCACHE" ]; then
  mkdir -p "\${GOCACHE%/*}" && cp -rs /${goCache} "$GOCACHE" && date +%s >"$GOCACHE/trim.txt"
fi
exec /${goRoot}/bin/go "$@"
`

/**
 * Compiles the standard library, with the same settings as in the image: they are part of the names under which the
 * cache has things. Only the compiled packages stay: other entries hold the paths and times of this build.
 */
async function compileGo(root: string): Promise<void> {
  const cache = join(root, goCache)
  await using scope = new AsyncDisposableStack()
  const home = await mkdtemp(`${root}.go-`)
  scope.defer(() => rm(home, { recursive: true, force: true }))
  const { stdout } = await execute(
    join(root, goRoot, 'bin/go'),
    ['list', '-export', '-f', '{{.Export}}', 'std'],
    {
      cwd: home,
      env: { ...goEnv, GOROOT: join(root, goRoot), GOCACHE: cache, GOPATH: join(home, 'path'), HOME: home },
      timeout: 900_000,
      maxBuffer: 16 << 20,
    },
  )
  const outputs = new Set(stdout.split('\n').map((path) => basename(path)))
  for (const file of ['trim.txt', 'testexpire.txt', 'README']) await rm(join(cache, file), { force: true })
  for (const file of globSync('*/*-d', { cwd: cache }))
    if (!outputs.has(basename(file))) await rm(join(cache, file))
  for (const file of globSync('*/*-a', { cwd: cache })) {
    // `v1 <action> <output> <size> <nanoseconds>`, padded with spaces.
    const entry = await readFile(join(cache, file), 'utf8')
    if (!outputs.has(`${entry.split(' ')[2]}-d`)) await rm(join(cache, file))
    else
      await writeFile(
        join(cache, file),
        entry.replace(/\d+(?=\n$)/, (time) => '0'.padStart(time.length)),
      )
  }
}

export const recipes: Readonly<Record<RuntimeName, Recipe>> = { base, node, python, go }

async function link(path: string, target: string): Promise<void> {
  await mkdir(dirname(path), { recursive: true })
  await symlink(target, path)
}

async function put(root: string, files: Record<string, string>): Promise<void> {
  for (const [path, text] of Object.entries(files)) {
    await mkdir(dirname(join(root, path)), { recursive: true })
    await writeFile(join(root, path), text)
  }
}
