"""What may live here: what many tests need: a recording handler, clients, and a Mux turned until something is true."""

from __future__ import annotations

import ctypes
import dis
import os
import random
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

import muxcore

LOCALHOST = ("127.0.0.1", 0)
DEADLINE = 20.0
ON, OFF = 1, 0
EXAMPLES = Path(__file__).parent.parent / "examples"

about_examples = [
    pytest.mark.skipif(not EXAMPLES.exists(), reason="the examples are not beside the tests"),
    pytest.mark.unix_only("it ends a process by a signal"),
]


class Recorder(muxcore.Handler):
    """Keeps (name, connection id, argument) of every callback; it sends what `reply` makes of a message."""

    def __init__(self, reply: Callable[[bytes], bytes] | None = None) -> None:
        self.events: list[tuple[str, int, Any]] = []
        self.connections: list[muxcore.Connection] = []
        self.reply = reply

    def on_open(self, conn: muxcore.Connection) -> None:
        self.events.append(("open", conn.id, None))
        self.connections.append(conn)

    def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
        self.events.append(("message", conn.id, message))
        if self.reply is not None:
            conn.send(self.reply(message))

    def on_drain(self, conn: muxcore.Connection) -> None:
        self.events.append(("drain", conn.id, None))

    def on_close(self, conn: muxcore.Connection, exc: BaseException | None) -> None:
        self.events.append(("close", conn.id, exc))

    def names(self) -> list[str]:
        return [name for name, _, _ in self.events]

    def count(self, name: str) -> int:
        return self.names().count(name)

    def received(self, conn_id: int | None = None) -> bytes:
        return b"".join(
            arg for name, number, arg in self.events if name == "message" and conn_id in (None, number)
        )

    def messages(self) -> list[Any]:
        return [arg for name, _, arg in self.events if name == "message"]

    def reason(self) -> BaseException | None:
        """Why the only connection that closed did."""
        [reason] = [arg for name, _, arg in self.events if name == "close"]
        return reason


def until(mux: muxcore.Mux, condition: Callable[[], object], deadline: float = DEADLINE) -> None:
    """Turn the Mux until the condition holds."""
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, "the condition never came true"
        mux.poll(0.02)


def turns(mux: muxcore.Mux, seconds: float) -> int:
    """Turn the Mux for a while in which nothing should happen; how many events there were."""
    before, end = mux.stats().events, time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        mux.poll(left)
    return mux.stats().events - before


def settle(mux: muxcore.Mux) -> list[tuple[muxcore.Connection, int]]:
    """Turn the Mux until three turns had nothing to do; what they reported. On a busy machine, the bound of a turn
    (3 ms) may end it amid its events."""
    reports, idle = [], 0
    while idle < 3:
        before = mux.stats().events
        reports += (found := mux.poll(0))
        idle = 0 if found or mux.stats().events > before else idle + 1
    return reports


def client(listener: muxcore.Listener, **buffers: int) -> socket.socket:
    """A connected blocking client; buffers: rcvbuf=, sndbuf= in bytes."""
    family = socket.AF_UNIX if isinstance(listener.address, str) else socket.AF_INET
    if isinstance(listener.address, tuple) and len(listener.address) == 4:
        family = socket.AF_INET6
    sock = socket.socket(family, socket.SOCK_STREAM)
    for name, option in (("rcvbuf", socket.SO_RCVBUF), ("sndbuf", socket.SO_SNDBUF)):
        if name in buffers:
            sock.setsockopt(socket.SOL_SOCKET, option, buffers[name])
    sock.settimeout(DEADLINE)
    try:
        sock.connect(listener.address)
    except OSError:
        sock.close()
        raise
    return sock


def reset(sock: socket.socket) -> None:
    """End a client with a RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def exchange(mux: muxcore.Mux, sock: socket.socket, data: bytes) -> bytes:
    """Send through an echo on `mux` and read as much back, from the same thread."""
    sock.sendall(data)
    return receive(mux, sock, len(data))


def receive(mux: muxcore.Mux, sock: socket.socket, size: int | None = None) -> bytes:
    """Read `size` bytes, or to the end, while the Mux turns."""
    got = bytearray()
    end = time.monotonic() + DEADLINE
    with nonblocking(sock):
        while size is None or len(got) < size:
            assert time.monotonic() < end, f"only {len(got)} bytes came"
            try:
                data = sock.recv(1 << 16)
            except BlockingIOError:
                mux.poll(0.02)
                continue
            if not data:
                break
            got += data
    return bytes(got)


def read_exactly(sock: socket.socket, size: int) -> bytes:
    """Read `size` bytes from a server in another process, or what came before its FIN."""
    got = bytearray()
    while len(got) < size and (data := sock.recv(size - len(got))):
        got += data
    return bytes(got)


def push(mux: muxcore.Mux, sock: socket.socket, data: bytes) -> None:
    """Send everything while the Mux turns."""
    view, end = memoryview(data), time.monotonic() + DEADLINE
    with nonblocking(sock):
        while view:
            assert time.monotonic() < end, f"{len(view)} bytes could not be sent"
            try:
                view = view[sock.send(view) :]
            except BlockingIOError:
                mux.poll(0.02)


def stuff(mux: muxcore.Mux, sock: socket.socket, message: bytes = bytes(1 << 16), limit: int = 64 << 20) -> int:
    """Send until neither the kernel nor the Mux accepts more; how many bytes were sent."""
    sent, chunk = 0, message * ((1 << 16) // len(message))
    with nonblocking(sock):
        while sent < limit:
            try:
                sent += sock.send(chunk)
            except BlockingIOError:
                before = mux.stats().bytes_in
                turns(mux, 0.05)
                if mux.stats().bytes_in == before:
                    return sent
    raise AssertionError("nothing ever stopped the sender")


@contextmanager
def nonblocking(sock: socket.socket) -> Iterator[None]:
    timeout = sock.gettimeout()
    sock.settimeout(0)
    try:
        yield
    finally:
        sock.settimeout(timeout)


@contextmanager
def alarms(fn: Callable[[], object] = bool) -> Iterator[list[int]]:
    """SIGALRM every 20 ms, which Python's handler counts, and calls `fn`: a wait in between must not notice."""
    caught: list[int] = []
    old = signal.signal(signal.SIGALRM, lambda number, frame: (caught.append(number), fn()))
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    try:
        yield caught
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def pattern(size: int) -> bytes:
    """Bytes in which every four encode their position, so that a loss, a repetition or a swap is visible."""
    return b"".join(struct.pack(">I", i) for i in range((size + 3) // 4))[:size]


def open_fds() -> list[str]:
    """Each open descriptor, with what it is open on."""
    found = []
    for fd in os.listdir("/dev/fd"):  # noqa: PTH208 -- which keeps the listing's own open meanwhile
        try:
            status = os.fstat(int(fd))
        except OSError:
            continue  # the listing's own
        found.append(f"{fd} {stat.filemode(status.st_mode)} {status.st_dev}:{status.st_ino}")
    return found


@contextmanager
def example(name: str, *arguments: str, backend: str = "auto", complains: bool = False) -> Iterator[int]:
    """The port of a program of examples/, which must end well and, unless it `complains`, print no error."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    pipe = subprocess.PIPE
    environment = {**os.environ, "MUXCORE_BACKEND": backend}
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline().split()[1])
        process.terminate()
        _, errors = process.communicate(timeout=20)
        assert (process.returncode, "" if complains else errors) == (0, "")
    finally:
        process.kill()
        process.communicate()


def free_port() -> int:
    """For a program that needs a port number. It is below the ephemeral ports: no other client gets it before the
    program binds it, and our client, if it connects too early, does not connect to itself."""
    while True:
        port = random.randrange(20000, 32768)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def datagram_reply(process: subprocess.Popen[bytes], port: int, question: bytes) -> bytes:
    """The reply of a program in another process, once it receives."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(20)
        sock.connect(("127.0.0.1", port))
        while process.poll() is None:
            try:
                sock.send(question)
                return sock.recv(1000)
            except ConnectionRefusedError:
                pass
    raise AssertionError(process.communicate()[1].decode())


def until_it_listens(process: subprocess.Popen[bytes], port: int) -> socket.socket:
    """A connection to a program in another process, once it is there."""
    while process.poll() is None:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=20)
        except ConnectionRefusedError:
            pass
    raise AssertionError(b"".join(filter(None, process.communicate())).decode())


def leave_errno(code: int) -> None:
    """As if a call had failed with it just now: errno stays what it is while calls succeed. Of glibc. Python's float()
    of a str sets it to 0, and so poll() with a timeout does."""
    place = ctypes.CDLL(None).__errno_location
    place.restype = ctypes.c_void_p
    ctypes.c_int.from_address(place()).value = code


def as_of_muxcore(fn: Any) -> Any:
    """A fake whose errors are those of a system call: what a function of another module raises amid one is a signal
    handler's."""
    names = {**fn.__globals__, "__name__": "muxcore"}
    return FunctionType(fn.__code__, names, None, fn.__defaults__, fn.__closure__)


class RaiseBehindCall:
    """A trace function that raises an error where CPython runs signal handlers: behind the n-th call in muxcore's
    Python, or as the n-th function or round of a loop of it begins. `came`: whether it has."""

    PACKAGE = str(Path(muxcore.__file__).parent)

    def __init__(self, at: int, error: BaseException) -> None:
        self.left, self.error, self.came = at, error, False
        self.last: tuple[Any, str] = None, ""

    def __call__(self, frame: Any, event: str, arg: Any) -> Any:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if not path.startswith(self.PACKAGE) or name in ("mutant", "__del__") or self.came:
            self.last = None, ""  # behind a function of Python's CPython looks for no signal
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            (before, name), self.last = self.last, (frame, dis.opname[frame.f_code.co_code[frame.f_lasti]])
            if before is frame and name.startswith(("CALL", "RESUME", "JUMP_BACKWARD")) and "INTRINSIC" not in name:
                self.left -= 1
                if self.left == 0:
                    self.came = True
                    raise self.error
        return self

    def during(self, fn: Callable[[], object]) -> bool:
        """Call it; whether the error came out of it."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            fn()
        except BaseException as error:
            if error is not self.error:
                raise
            return True
        finally:
            sys.settrace(before)
            self.last = None, ""
        return False


class ByLine:
    """A framer of the user's, which keeps what it was fed."""

    def __init__(self) -> None:
        self.data = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        self.data += data
        while b"\n" in self.data:
            line, _, self.data = self.data.partition(b"\n")
            yield line

    def encode(self, message: bytes) -> bytes:
        return message + b"\n"

    def rest(self) -> bytes:
        return self.data


class InterruptAt:
    """A trace function that raises KeyboardInterrupt at the n-th line of a file of muxcore's that runs, in functions
    that are called once `since()` is true."""

    def __init__(self, file: str, at: int, since: Callable[[], object] = lambda: True) -> None:
        self.file, self.left, self.since = file, at, since

    def __call__(self, frame: Any, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.endswith(self.file) or not self.since():
            return None
        if event in ("call", "line"):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self

    def during(self, fn: Callable[[], object]) -> None:
        before = sys.gettrace()
        sys.settrace(self)
        try:
            fn()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)


class MallocInfo(ctypes.Structure):
    """What mallinfo2(3) returns."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def allocated() -> int:
    """Bytes that malloc has handed out, those of tracemalloc aside: the resident memory of a process varies with what
    its allocators keep for later (a free-threaded build's by megabytes)."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("only glibc has mallinfo2")
    mallinfo = libc.mallinfo2
    mallinfo.restype = MallocInfo
    info = mallinfo()
    return int(info.uordblks + info.hblkhd) - tracemalloc.get_tracemalloc_memory()


@contextmanager
def memory(backend: str) -> Iterator[Callable[[], int]]:
    """How many bytes more are in use than at the beginning: of Python's, where the fallback has all of its memory; or
    of malloc's, where the compiled core has its own, if those are more (a large object may be counted in both)."""
    tracemalloc.start()
    try:
        counts = [lambda: tracemalloc.get_traced_memory()[0], *([allocated] if backend == "epoll" else [])]
        before = [count() for count in counts]
        yield lambda: max(count() - was for count, was in zip(counts, before, strict=True))
    finally:
        tracemalloc.stop()


class SignalAt:
    """A `with` block in which a signal handler raises `error` at the n-th place in a file of muxcore's where CPython
    runs signal handlers: behind a call, at the entry of a function, and where a loop or a generator goes on.

    left: negative once it has come.
    where: the function in which it came.
    entry: whether that was at its entry.
    """

    def __init__(self, file: str, n: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.file, self.left, self.error = str(Path(muxcore.__file__).with_name(file)), n, error
        self.last: tuple[Any, str] = (None, "")
        self.where, self.entry = "", False

    def trace(self, frame: Any, event: str, arg: Any) -> Any:
        if frame.f_code.co_filename != self.file:
            return None
        frame.f_trace_opcodes = True
        here = event == "call"
        if event == "opcode":
            last, self.last = self.last, (frame, dis.opname[frame.f_code.co_code[frame.f_lasti]])
            here = last[0] is frame and last[1].startswith(("CALL", "JUMP_BACKWARD")) and "INTRINSIC" not in last[1]
        if here:
            self.left -= 1
            if self.left < 0:
                sys.settrace(None)
                self.where, self.entry = frame.f_code.co_name, event == "call"
                raise self.error("a signal handler")
        return self.trace

    def __enter__(self) -> SignalAt:
        self.before = sys.gettrace()
        sys._getframe().f_trace_opcodes = True  # Python 3.12 looks at no frame's if this is false when it begins
        sys.settrace(self.trace)
        return self

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> bool:
        sys.settrace(self.before)
        self.last = (None, "")
        return kind is self.error
