/** Why tests of a file fail, by the first pattern that its path matches. A failing file without a reason fails the run. */
export const reasons: [path: RegExp, reason: string][] = [
  [
    /idlharness/,
    'A global is an accessor until it is first touched, then a plain data property: that is how groups of APIs are loaded late. Some also look for `WorkerGlobalScope`, and @exodus/bytes keeps `encoding`, `fatal` and `ignoreBOM` on the instance.',
  ],
  [
    /^url\/url-constructor/,
    'Names with an invalid `xn--` label: whatwg-url lets plain ASCII names through, and so does Node’s own URL.',
  ],
  [
    /^urlpattern\/.*generate/,
    '`URLPattern.prototype.generate` is a proposal; the polyfill does not have it.',
  ],
  [
    /^urlpattern\//,
    'urlpattern-polyfill percent-encodes some characters beyond the basic plane in names of groups, is stricter with whitespace in ports and differs in some error cases.',
  ],
  [
    /headers\/header-setcookie/,
    'Deliberate, as in all server runtimes: `set-cookie` can be read from and written to a Response.',
  ],
  [
    /request\/request-headers/,
    'Deliberate, as in all server runtimes: no request header is forbidden (`host`, `cookie`, `origin` …).',
  ],
  [
    /consume-empty/,
    'An empty FormData is sent as a closing boundary, as undici does; the test wants nothing at all.',
  ],
  [/owning-type/, '`type: "owning"` is a proposal; VideoFrame belongs to browsers.'],
  [
    /streams\/piping\/general-addition/,
    'web-streams-polyfill writes synchronously where the standard waits a step.',
  ],
  [/writable-streams\/general/, 'web-streams-polyfill calls `size` as a method of the strategy.'],
  [
    /compression\/decompression-corrupt/,
    'fflate does not check the Adler-32 sum of a deflate stream, nor what follows its end.',
  ],
  [/compression\/compression-output-length/, 'Fetches a large media file that the folder does not hold.'],
  [/structured-clone/, 'A SharedArrayBuffer cannot be cloned: there is nobody to share it with.'],
  [
    /EventTarget-removeEventListener|queue-microtask-exceptions|no-regexp-special|event-global/,
    'The global object is no EventTarget: nothing is dispatched on it. An uncaught error ends the call.',
  ],
  [/timers\/evil-spec-example/, 'A string is not a callback: timers do not evaluate text.'],
  [/DOMException-constructor-and-prototype/, 'A global is an accessor until it is first touched.'],
  [/global-immutable-prototype/, 'V8’s global object of a bare context has a prototype that can be set.'],
  [
    /WebCryptoAPI\/historical/,
    'Expects no `crypto.subtle` outside of secure contexts; an isolate always is one.',
  ],
]
