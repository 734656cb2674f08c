"""Runs in a container, around a handler for Python: reads runs from descriptor 4 and answers on descriptor 3, one at
a time. Python 3.8 or newer, the standard library alone. The messages are those of shared/guest.ts; calls by HTTP are
made into calls with JSON by the runner.
"""

import asyncio
import contextlib
import importlib.util
import inspect
import io
import json
import os
import shutil
import struct
import sys
import threading
import time
import traceback

FRAMES_IN = 4
FRAMES_OUT = 3
RAW_OUT = 2

RUN, CANCEL = 1, 3
READY, LOG, DONE, SPAN = 16, 17, 18, 23
ABSENT = 0xFFFFFFFF
# EX_SOFTWARE of sysexits.h.
LOST_VOICE = 70
MAX_LINE_BYTES = 64 * 1024
MAX_MESSAGE = 16_000
MAX_STACK = 32_000
# As protocol.ts has it.
WORKSPACE = "/workspace"
# Of the spans of one run, as shared/guest.ts has them.
MAX_SPANS = 256
MAX_SPAN_ATTRIBUTES = 32
MAX_SPAN_KEY = 128
MAX_SPAN_VALUE = 1_024
MAX_SPAN_TEXT = 16_000
# Lines and pieces of code of the user's process in front of the handler's own.
OWN_FILE = os.path.abspath(__file__)

PID = os.getpid()
writing = threading.Lock()


def write_all(fd, data):
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            # The runner is slow to read: this is what holds a flood of lines back.
            threading.Event().wait(0.001)
        except OSError:
            # The user's code has closed it: nothing can be said any more.
            os._exit(LOST_VOICE)


def read_exactly(size):
    parts = []
    while size > 0:
        part = os.read(FRAMES_IN, min(size, 1 << 20))
        if not part:
            # The runner is gone.
            os._exit(0)
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def send(kind, run, *parts):
    encoded = [None if part is None else part.encode("utf-8", "replace") if isinstance(part, str) else part for part in parts]
    head = struct.pack(">BIIB", kind, run, 0, len(encoded))
    lengths = b"".join(struct.pack(">I", ABSENT if part is None else len(part)) for part in encoded)
    payload = head + lengths + b"".join(part for part in encoded if part is not None)
    with writing:
        write_all(FRAMES_OUT, struct.pack(">I", len(payload)) + payload)


def receive():
    """Kind, number of the run, parts."""
    (size,) = struct.unpack(">I", read_exactly(4))
    payload = read_exactly(size)
    kind, run, _, count = struct.unpack_from(">BIIB", payload)
    at = 10 + 4 * count
    parts = []
    for length in struct.unpack_from(f">{count}I", payload, 10):
        if length == ABSENT:
            parts.append(None)
            continue
        parts.append(payload[at : at + length])
        at += length
    return kind, run, parts


def cut_line(text):
    data = text.encode("utf-8", "replace")
    if len(data) <= MAX_LINE_BYTES:
        return data
    kept = data[:MAX_LINE_BYTES].decode("utf-8", "ignore")
    return f"{kept} … [line cut: it had {len(data)} bytes]".encode()


class Signal:
    """Set when the workload is stopped."""

    def __init__(self):
        self._event = threading.Event()
        self.reason = None

    @property
    def aborted(self):
        return self._event.is_set()

    def wait(self, timeout=None):
        """Waits until the workload is stopped, at most so many seconds; whether it is."""
        return self._event.wait(timeout)

    def _abort(self, reason):
        self.reason = reason
        self._event.set()


class Log:
    """`ctx.log(…)`, `ctx.log.warn(…)`: lines with a level."""

    def __init__(self, run):
        self._run = run

    def _write(self, level, args):
        text = " ".join(str(arg) for arg in args)
        if os.getpid() == PID and self._run is state.run:
            send(LOG, self._run.number, level, cut_line(text), "console")

    def __call__(self, *args):
        self._write("info", args)

    def debug(self, *args):
        self._write("debug", args)

    def info(self, *args):
        self._write("info", args)

    def warn(self, *args):
        self._write("warn", args)

    warning = warn

    def error(self, *args):
        self._write("error", args)


def attributes_of(values):
    """Bounded, so that what is sent is; what no attribute can be is left out."""
    kept = {}
    if not isinstance(values, dict):
        return kept
    for key, value in list(values.items())[:MAX_SPAN_ATTRIBUTES]:
        if not isinstance(key, str) or len(key) > MAX_SPAN_KEY:
            continue
        if isinstance(value, str):
            kept[key] = value if len(value) <= MAX_SPAN_VALUE else f"[{len(value)} characters]"
        elif isinstance(value, bool) or (isinstance(value, (int, float)) and -(2**63) < value < 2**63):
            kept[key] = value
    return kept


class Span:
    """A part of a run, for its trace: `with ctx.span(name) as span: …`."""

    def __init__(self, run, parent, name, attributes):
        self._run = run
        self._parent = parent
        self._name = str(name)[:MAX_SPAN_TEXT]
        self._attributes = attributes_of(attributes)
        self._id = None
        #: What is sent on, so that what follows stands under this span.
        self.traceparent = run.traceparent if parent is None else parent.traceparent

    def set(self, attributes):
        self._attributes = attributes_of({**self._attributes, **attributes_of(attributes)})

    def span(self, name, fn=None, attributes=None):
        """As `ctx.span`, below this one."""
        return span_of(self._run, self, name, fn, attributes)

    def _above(self):
        """The nearest that was begun."""
        return self if self._id is not None or self._parent is None else self._parent._above()

    def __enter__(self):
        run = self._run
        if not run.traced or run.spans >= MAX_SPANS or self._id is not None or not run.live():
            return self
        run.spans += 1
        self._id = os.urandom(8).hex()
        self.traceparent = f"{run.traceparent[:36]}{self._id}{run.traceparent[52:]}"
        head = {"id": self._id, "name": self._name, "start": run.ms()}
        above = None if self._parent is None else self._parent._above()._id
        if above is not None:
            head["parent"] = above
        self._send(head)
        return self

    def __exit__(self, kind, error, trace):
        if self._id is not None and self._run.live():
            head = {"id": self._id, "end": self._run.ms()}
            if error is not None:
                head["error"] = message_of(error)[:MAX_SPAN_TEXT]
            self._send(head)
        return False

    def _send(self, head):
        send(SPAN, self._run.number, json.dumps({**head, "attributes": self._attributes}))


def span_of(run, parent, name, fn, attributes):
    span = Span(run, parent, name, attributes)
    if fn is None:
        return span
    with contextlib.ExitStack() as stack:
        stack.enter_context(span)
        result = fn(span)
        if not inspect.isawaitable(result):
            return result
        # Ends with what it awaits.
        held = stack.pop_all()

    async def awaited():
        with held:
            return await result

    return awaited()


class Context:
    def __init__(self, run, given):
        self._run = run
        self.id = given["id"]
        self.attempt = given["attempt"]
        self.traceparent = given["traceparent"]
        self.env = given["env"]
        self.signal = run.signal
        self.log = Log(run)

    def span(self, name, fn=None, attributes=None):
        """What `fn(span)` returns, or without `fn` what `with` takes: a part of the run, for its trace."""
        return span_of(self._run, None, name, fn, attributes)


class Run:
    def __init__(self, number, header, given, data):
        self.number = number
        self.header = header
        self.signal = Signal()
        self.task = None
        self.data = data
        self.came = time.perf_counter()
        self.traceparent = given["traceparent"]
        self.traced = given.get("traced") is True and self.traceparent is not None
        self.spans = 0
        # When the handler was called, and when it was through.
        self.guest = None
        self.through = None
        self.ctx = Context(self, given)

    def ms(self):
        """Since it came."""
        return (time.perf_counter() - self.came) * 1000

    def live(self):
        return os.getpid() == PID and self is state.run


class State:
    run = None


state = State()


class Lines(io.TextIOBase):
    """Standard output or error: a message for each line while a run is under way."""

    encoding = "utf-8"
    errors = "replace"

    def __init__(self, stream, level):
        self._stream = stream
        self._level = level
        self._rest = ""
        self._lock = threading.RLock()

    def writable(self):
        return True

    def isatty(self):
        return False

    def fileno(self):
        return RAW_OUT

    @property
    def buffer(self):
        return Raw(self)

    def write(self, text):
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        if os.getpid() != PID:
            # A child that was forked: the messages are its parent's.
            write_all(RAW_OUT, text.encode("utf-8", "replace"))
            return len(text)
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
            for line in lines:
                self._emit(line)
            if len(self._rest) > MAX_LINE_BYTES:
                line, self._rest = self._rest, ""
                self._emit(line)
        return len(text)

    def end(self):
        """What has no end of line yet is a line too."""
        with self._lock:
            line, self._rest = self._rest, ""
            if line:
                self._emit(line)

    def _emit(self, line):
        run = state.run
        if run is not None:
            send(LOG, run.number, self._level, cut_line(line), self._stream)


class Raw(io.RawIOBase):
    """`sys.stdout.buffer`."""

    def __init__(self, lines):
        self._lines = lines

    def writable(self):
        return True

    def write(self, data):
        self._lines.write(bytes(data).decode("utf-8", "replace"))
        return len(data)


class InvalidCode(Exception):
    pass


WANTED = "def handler(input, ctx): return output"


def entry_of(header):
    root, entry = header["root"], header["entry"]
    if entry is not None:
        path = os.path.join(root, entry)
        if not os.path.isfile(path):
            raise InvalidCode(f"there is no file {entry} in the source")
        return path
    for folder in ("", "src"):
        for name in ("main.py", "handler.py", "app.py", "index.py"):
            path = os.path.join(root, folder, name)
            if os.path.isfile(path):
                return path
    raise InvalidCode("no entry file was found: name one as entrypoint, or call it main.py")


def way_to_packages(error, root):
    """For a package that nobody has installed: how it comes here."""
    # Into an image nothing is installed.
    if error.name is None or root != WORKSPACE or os.path.isdir(os.path.join(root, "vendor")):
        return ""
    name = error.name.partition(".")[0]
    return f"\n{name} is not here: deploy the code as a function with it in requirements.txt, or bring it in the folder vendor"


def load(header):
    path = entry_of(header)
    # Requirements are installed at deploy into `vendor`.
    for folder in (os.path.join(header["root"], "vendor"), header["root"], os.path.dirname(path)):
        if folder in sys.path:
            sys.path.remove(folder)
        sys.path.insert(0, folder)
    name = os.path.splitext(os.path.basename(path))[0]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise InvalidCode(f"{header['entry']} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        if error.filename is not None:
            place = f"{error.filename}:{error.lineno}"
            raise InvalidCode(f"{type(error).__name__}: {error.msg} ({place})") from None
        raise
    except ModuleNotFoundError as error:
        raise InvalidCode(f"{error}{way_to_packages(error, header['root'])}") from None
    handler = getattr(module, "handler", None)
    if handler is None:
        raise InvalidCode(f"the code has no handler; write: {WANTED}")
    if not callable(handler):
        raise InvalidCode(f"handler is not a function but {handler!r}; write: {WANTED}")
    return handler


def takes_context(handler):
    try:
        inspect.signature(handler).bind(None, None)
        return True
    except TypeError:
        return False
    except ValueError:
        return True


def done(run, status, cause=None, message=None, stack=None, output=None, worn=False):
    if run is not state.run:
        return
    sys.stdout.end()
    sys.stderr.end()
    state.run = None
    header = {"status": status, "cause": cause, "message": message, "stack": stack}
    if message is not None:
        header["message"] = message[:MAX_MESSAGE]
    if worn:
        header["worn"] = True
    if run.traced and run.guest is not None:
        header["guest"] = [run.guest, run.through or run.ms()]
    with writing:
        write_all(RAW_OUT, f"\0vulcan:{run.header['mark']}\n".encode())
    send(DONE, run.number, json.dumps(header), output)


def stack_of(error):
    """As Python prints it, without the frames of this file."""
    summary = traceback.TracebackException.from_exception(error)

    def clean(one, seen):
        if one is None or id(one) in seen:
            return
        seen.add(id(one))
        frames = [frame for frame in one.stack if os.path.abspath(frame.filename) != OWN_FILE and "importlib._bootstrap" not in frame.filename]
        one.stack = traceback.StackSummary.from_list(frames)
        clean(one.__cause__, seen)
        clean(one.__context__, seen)

    clean(summary, set())
    return "".join(summary.format())[-MAX_STACK:].rstrip("\n")


def message_of(error):
    try:
        text = str(error)
    except Exception:
        text = "an error whose text cannot be had"
    name = type(error).__name__
    return text if type(error) is Exception and text else f"{name}: {text}" if text else name


def threw(run, error, worn=False):
    message = message_of(error)
    try:
        stack = stack_of(error)
    except Exception:
        stack = None
    done(run, "failed", "user_error", message, stack, worn=worn)


def wake_up(seed, root):
    """Every copy of a snapshot has the state that the generator had in it."""
    os.chdir(root)
    if "random" in sys.modules:
        sys.modules["random"].seed(bytes.fromhex(seed))


class Shim:
    def __init__(self):
        self.handler = None
        self.with_context = True
        self.loop = None

    def call(self, value, run):
        run.guest = run.ms()
        try:
            return self.called(value, run)
        finally:
            run.through = run.ms()

    def called(self, value, run):
        result = self.handler(value, run.ctx) if self.with_context else self.handler(value)
        if not inspect.isawaitable(result):
            return result
        if self.loop is None:
            self.loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self.loop)

        async def main():
            run.task = asyncio.current_task()
            return await result

        return self.loop.run_until_complete(main())

    def run(self, run):
        seed, rehearsal = run.header.get("seed"), run.header.get("rehearsal")
        root, modules, path = run.header["root"], set(sys.modules), list(sys.path)
        if rehearsal:
            os.makedirs(root, exist_ok=True)
            for name, text in rehearsal.items():
                with open(os.path.join(root, name), "w") as file:
                    file.write(text)
        if seed is not None:
            wake_up(seed, root)
        self.perform(run)
        if rehearsal is None:
            return
        if seed is not None:
            os.chdir("/")
        # What was loaded of the standard library may stay; what was written here may not.
        for name in set(sys.modules) - modules:
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(root):
                del sys.modules[name]
        sys.path[:] = path
        for name in [name for name in sys.path_importer_cache if name.startswith(root)]:
            del sys.path_importer_cache[name]
        if rehearsal:
            shutil.rmtree(root, ignore_errors=True)
        self.handler = None

    def perform(self, run):
        if self.handler is None:
            try:
                os.environ.update(run.ctx.env)
                self.handler = load(run.header)
                self.with_context = takes_context(self.handler)
            except InvalidCode as error:
                return done(run, "failed", "invalid_workload", str(error), worn=True)
            except SystemExit:
                raise
            except BaseException as error:
                return threw(run, error, worn=True)
        try:
            value = None if run.data is None else json.loads(run.data)
            run.data = None
            result = self.call(value, run)
        except SystemExit:
            raise
        except BaseException as error:
            if os.getpid() != PID:
                raise
            return threw(run, error)
        if os.getpid() != PID:
            # A forked child that came back from the handler must not answer for its parent.
            os._exit(0)
        try:
            output = json.dumps(result, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
        except UnicodeEncodeError:
            output = json.dumps(result, allow_nan=False, separators=(",", ":")).encode("ascii")
        except Exception as error:
            return done(run, "failed", "output_invalid", f"the output is not JSON: {error}")
        limit = run.header["output_bytes"]
        if len(output) > limit:
            text = f"the output has {len(output)} bytes, the limit is {limit} (limits.output_mb)"
            return done(run, "failed", "output_too_large", text)
        done(run, "completed", output=output)


class Inbox:
    """Messages come on a thread of their own, so that a handler at work can be told to stop."""

    def __init__(self, shim):
        self.shim = shim
        self.runs = []
        self.wake = threading.Semaphore(0)

    def listen(self):
        while True:
            kind, number, parts = receive()
            if kind == RUN:
                header, given = json.loads(parts[0]), json.loads(parts[1])
                self.runs.append(Run(number, header, given, parts[3]))
                self.wake.release()
            elif kind == CANCEL:
                run = state.run
                if run is not None and run.number == number:
                    run.signal._abort((parts[0] or b"").decode())
                    if run.task is not None and self.shim.loop is not None:
                        self.shim.loop.call_soon_threadsafe(run.task.cancel)

    def next(self):
        self.wake.acquire()
        return self.runs.pop(0)


def main():
    os.set_inheritable(FRAMES_IN, False)
    os.set_inheritable(FRAMES_OUT, False)
    sys.stdin = open(os.devnull)
    sys.stdout = Lines("stdout", "info")
    sys.stderr = Lines("stderr", "error")
    sys.dont_write_bytecode = True
    if sys.path and os.path.abspath(sys.path[0]) == os.path.dirname(OWN_FILE):
        sys.path.pop(0)
    shim = Shim()
    inbox = Inbox(shim)
    threading.Thread(target=inbox.listen, daemon=True).start()
    send(READY, 0, sys.version.split()[0])
    while True:
        run = inbox.next()
        state.run = run
        try:
            shim.run(run)
        except SystemExit as exit:
            sys.stdout.end()
            sys.stderr.end()
            if exit.code is None or isinstance(exit.code, int):
                os._exit((exit.code or 0) & 0xFF)
            write_all(RAW_OUT, f"{exit.code}\n".encode("utf-8", "replace"))
            os._exit(1)


if __name__ == "__main__":
    main()
