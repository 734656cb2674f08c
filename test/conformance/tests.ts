/** Which of the web platform tests are run, by API, and which cannot be, by rule. */
import { existsSync, globSync, readFileSync } from 'node:fs'
import { dirname, join, normalize } from 'node:path'

export interface Api {
  name: string
  /** Patterns below the folder of the tests. */
  files: string[]
  except?: RegExp
  /** At least this share of its tests must pass. */
  target?: number
}

export const apis: Api[] = [
  { name: 'URL', files: ['url/*'], except: /urlsearchparams|urlencoded/, target: 0.95 },
  { name: 'URLSearchParams', files: ['url/urlsearchparams*', 'url/urlencoded*'], target: 0.95 },
  { name: 'URLPattern', files: ['urlpattern/*'] },
  { name: 'Encoding', files: ['encoding/**/*'], target: 0.95 },
  { name: 'Headers', files: ['fetch/api/headers/*'], target: 0.95 },
  { name: 'Request', files: ['fetch/api/request/**/*'] },
  { name: 'Response', files: ['fetch/api/response/**/*'] },
  { name: 'Bodies, data: URLs', files: ['fetch/api/body/*', 'fetch/data-urls/*', 'fetch/api/*.any.js'] },
  { name: 'Streams', files: ['streams/**/*'], target: 0.95 },
  { name: 'Compression', files: ['compression/**/*'] },
  { name: 'Structured clone', files: ['html/webappapis/structured-clone/*'], target: 0.95 },
  { name: 'Abort', files: ['dom/abort/**/*'], target: 0.95 },
  { name: 'Events', files: ['dom/events/**/*'] },
  { name: 'Blob, File', files: ['FileAPI/blob/**/*', 'FileAPI/file/**/*'] },
  { name: 'FormData', files: ['xhr/formdata/*'] },
  { name: 'DOMException', files: ['webidl/ecmascript-binding/**/*'] },
  { name: 'atob, btoa', files: ['html/webappapis/atob/*'] },
  {
    name: 'Timers, queueMicrotask',
    files: ['html/webappapis/timers/*', 'html/webappapis/microtask-queuing/*'],
  },
  { name: 'performance', files: ['hr-time/*'] },
  { name: 'Web Crypto', files: ['WebCryptoAPI/**/*'] },
]

/** Why a file is not run. */
export const rules = {
  dom: 'needs a DOM: a page (`.html`, `.xhtml`, `.svg`) or a script for a window only (`.window.js`, `global=window`)',
  worker:
    'needs workers: `.worker.js`, scripts for service workers or ShadowRealms only, or one that starts a worker',
  server:
    'needs a test server: answers made by `.py` handlers, hosts of `get-host-info.sub.js`, `.sub.` files, piped responses',
} as const
export type Rule = keyof typeof rules

export interface TestFile {
  path: string
  /** Query strings to run it with. */
  variants: string[]
  /** Paths of its helpers, in order. */
  scripts: string[]
}

const isPage = /\.(html|xhtml|htm|svg|xml)$/
const isScript = /\.(any|window|worker|serviceworker|sharedworker)\.js$/
const needsServer =
  /\.py\b|get-host-info|\.sub\.|[?&]pipe=|\bXMLHttpRequest\b|RESOURCES_DIR|BASE_URL|\/common\/dispatcher|create_sw_url|\bwebsocket/i
const needsWorker = /new (Shared)?Worker\(|serviceWorker|new ShadowRealm/
const needsDom = /\bdocument\.|\bwindow\.|createElement|\biframe\b/

const meta = (source: string, key: string): string[] =>
  [...source.matchAll(new RegExp(`^// META: ${key}=(.*)$`, 'gm'))].map(([, value]) => value!.trim())

/** The files of an API, sorted into what is run and what a rule excludes. */
export function filesOf(api: Api, folder: string): { run: TestFile[]; excluded: Map<string, Rule> } {
  const run: TestFile[] = []
  const excluded = new Map<string, Rule>()
  const paths = [...new Set(api.files.flatMap((pattern) => globSync(pattern, { cwd: folder })))]
  for (const path of paths.sort()) {
    if (api.except?.test(path) || /\/resources?\//.test(path)) continue
    if (isPage.test(path)) {
      const source = readFileSync(join(folder, path), 'utf8')
      if (/testharness\.js|-ref\.html|crashtest|rel="?(mis)?match/.test(source) || /crash/.test(path))
        excluded.set(path, 'dom')
      continue
    }
    if (!isScript.test(path)) continue
    const source = readFileSync(join(folder, path), 'utf8')
    const scripts = meta(source, 'script').map((script) =>
      script.startsWith('/') ? script.slice(1) : normalize(join(dirname(path), script)),
    )
    const rule = ruleFor(path, source, scripts, folder)
    if (rule !== undefined) excluded.set(path, rule)
    else {
      const variants = meta(source, 'variant')
      run.push({ path, scripts, variants: variants.length > 0 ? variants : [''] })
    }
  }
  return { run, excluded }
}

function ruleFor(path: string, source: string, scripts: string[], folder: string): Rule | undefined {
  if (path.endsWith('.window.js')) return 'dom'
  if (!path.endsWith('.any.js')) return 'worker'
  const [globals] = meta(source, 'global')
  if (globals !== undefined) {
    const list = globals.split(',').map((name) => name.trim())
    if (list.every((name) => name === 'window')) return 'dom'
    if (!list.some((name) => ['window', 'worker', 'dedicatedworker'].includes(name))) return 'worker'
  }
  const all = [source, ...scripts.map((script) => read(join(folder, script)))].join('\n')
  if (scripts.some((script) => needsServer.test(script)) || needsServer.test(source)) return 'server'
  if (/\bXMLHttpRequest\b|\.py\b/.test(all)) return 'server'
  if (needsWorker.test(source)) return 'worker'
  if (needsDom.test(source.replace(/typeof (document|window)\b/g, ''))) return 'dom'
  return undefined
}

const read = (path: string) => (existsSync(path) ? readFileSync(path, 'utf8') : '')
