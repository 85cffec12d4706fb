"""Handlers in C, in a module that is compiled against the package as it is installed (Promise native-handlers)."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support import EXAMPLES, LOCALHOST, about_examples, receive, until, until_it_listens

import muxcore
from muxcore._impl import BACKENDS

pytest.importorskip("Cython")
pytest.importorskip("setuptools", reason="cythonize compiles with it")
pytestmark = [
    pytest.mark.skipif("epoll" not in BACKENDS, reason="the compiled core is missing"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler for the user's module"),
]

beside_the_examples = about_examples[0]
SOURCE = """
# cython: language_level=3
from muxcore cimport Connection, NativeHandler, close, send, write

cdef class Recorder(NativeHandler):
    cdef public list events
    cdef public object raises

    def __init__(self):
        self.events = []

    cdef int on_open(self, Connection conn) except -1:
        self.events.append(("open", conn))
        return 0

    cdef int on_message(self, Connection conn, object message) except -1:
        self.events.append(("message", message))
        if self.raises is not None:
            raise self.raises
        if message == b"close":
            close(conn, ValueError("a reason"))
        elif message == b"raw":
            write(conn, b"as it is")
        else:
            self.events.append(("sent", send(conn, message)))
        return 0

    cdef int on_drain(self, Connection conn) except -1:
        self.events.append(("drain", conn))
        return 0

    cdef int on_eof(self, Connection conn) except -1:
        self.events.append(("eof", conn))
        conn.close()
        return 0

    cdef int on_error(self, Connection conn, object exc) except -1:
        self.events.append(("error", exc))
        send(conn, b"too long")
        return 0

    cdef int on_close(self, Connection conn, object exc) except -1:
        self.events.append(("close", exc))
        return 0


cdef class Batches(NativeHandler):
    cdef public list batches

    def __init__(self):
        self.batches = []

    cdef int on_messages(self, Connection conn, list messages) except -1:
        self.batches.append(messages)
        for message in messages:
            send(conn, message)
        return 0


cdef class Derived(Batches):
    cdef int on_close(self, Connection conn, object exc) except -1:
        self.batches.append([exc])
        return 0


def send_now(Connection conn, message):
    return send(conn, message)
"""


def compiled(source: str, name: str, folder: Path) -> ModuleType:
    (folder / f"{name}.pyx").write_text(source)
    command = [sys.executable, "-m", "Cython.Build.Cythonize", "-i", "-q", f"{name}.pyx"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    spec = importlib.util.spec_from_file_location(name, folder / (name + sysconfig.get_config_var("EXT_SUFFIX")))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return compiled(SOURCE, "native_recorder", tmp_path_factory.mktemp("native"))


@pytest.fixture
def mux() -> Iterator[muxcore.Mux]:
    with muxcore.Mux(backend="epoll") as mux:
        yield mux


Connect = Callable[..., tuple[socket.socket, Any]]


@pytest.fixture
def connect(mux: muxcore.Mux) -> Iterator[Connect]:
    """A client of a handler, and the Connection."""
    socks = []

    def connected(handler: Any, **options: Any) -> tuple[socket.socket, Any]:
        listener = mux.listen(LOCALHOST, handler, **options)
        socks.append(socket.create_connection(listener.address, 10))
        until(mux, lambda: mux.stats().connections)
        return socks[-1], next(iter(mux.connections))

    yield connected
    for sock in socks:
        sock.close()


def names(handler: Any) -> list[str]:
    return [event[0] for event in handler.events]


def test_each_callback_comes_once_and_in_order(mux: muxcore.Mux, connect: Connect, native: ModuleType) -> None:
    handler = native.Recorder()
    sock, conn = connect(handler, framer=muxcore.Lines())
    sock.sendall(b"one\nraw\n")
    assert receive(mux, sock, 12) == b"one\nas it is"
    sock.shutdown(socket.SHUT_WR)
    until(mux, lambda: "close" in names(handler))
    assert handler.events == [
        ("open", conn), ("message", b"one"), ("sent", True), ("message", b"raw"), ("eof", conn), ("close", None),
    ]  # fmt: skip


def test_close_gives_its_reason(mux: muxcore.Mux, connect: Connect, native: ModuleType) -> None:
    handler = native.Recorder()
    sock, _ = connect(handler, framer=muxcore.Lines(), timeouts=muxcore.Timeouts(linger=0))
    sock.sendall(b"close\nlater\n")
    until(mux, lambda: "close" in names(handler))
    assert names(handler) == ["open", "message", "close"]
    assert str(handler.events[-1][1]) == "a reason"


def test_the_outbox_has_its_water_marks(mux: muxcore.Mux, connect: Connect, native: ModuleType) -> None:
    handler = native.Recorder()
    limits = muxcore.Limits(low=0, high=1000, max_outbox=1 << 26, autopause=False)
    sock, conn = connect(handler, limits=limits)
    while native.send_now(conn, bytes(1 << 16)):
        pass
    assert conn.outbox_size > 1000
    while "drain" not in names(handler):
        sock.recv(1 << 20)
        mux.poll(0)
    assert names(handler) == ["open", "drain"]


def test_malformed_input_and_a_reply_to_it(mux: muxcore.Mux, connect: Connect, native: ModuleType) -> None:
    handler = native.Recorder()
    sock, _ = connect(handler, framer=muxcore.Lines(max_size=10), timeouts=muxcore.Timeouts(linger=0))
    sock.sendall(b"x" * 20 + b"\n")
    until(mux, lambda: "close" in names(handler))
    assert names(handler) == ["open", "error", "close"]
    assert isinstance(handler.events[1][1], muxcore.FrameTooLarge)
    assert sock.recv(100) == b"too long\n"


@pytest.mark.parametrize(("error", "counted"), [(ZeroDivisionError(), 1), (muxcore.FrameError("bad"), 0)])
def test_one_that_raises_closes_its_connection_alone(
    mux: muxcore.Mux, connect: Connect, native: ModuleType, error: Exception, counted: int,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    handler = native.Recorder()
    sock, _ = connect(handler, timeouts=muxcore.Timeouts(linger=0))
    handler.raises = error
    sock.sendall(b"x")
    until(mux, lambda: "close" in names(handler))
    assert handler.events[-1] == ("close", error)
    assert mux.stats().handler_errors == counted == len(caplog.records)


def test_an_interrupt_in_one_leaves_the_loop(mux: muxcore.Mux, connect: Connect, native: ModuleType) -> None:
    handler = native.Recorder()
    sock, conn = connect(handler, framer=muxcore.Lines())
    handler.raises = KeyboardInterrupt()
    sock.sendall(b"one\ntwo\n")
    with pytest.raises(KeyboardInterrupt):
        until(mux, lambda: conn.closed)
    handler.raises = None
    until(mux, lambda: ("message", b"two") in handler.events)
    assert not conn.closing


def test_messages_of_one_read_come_as_a_list(mux: muxcore.Mux, connect: Connect, native: ModuleType) -> None:
    handler = native.Batches()
    sock, _ = connect(handler, framer=muxcore.LengthPrefix(1))
    sock.sendall(b"\x03one\x03two")
    assert receive(mux, sock, 8) == b"\x03one\x03two"
    assert handler.batches == [[b"one", b"two"]]


def test_without_on_eof_the_connection_closes_after_its_flush(
    mux: muxcore.Mux, connect: Connect, native: ModuleType
) -> None:
    handler = native.Derived()
    sock, conn = connect(handler)
    sock.sendall(b"x")
    sock.shutdown(socket.SHUT_WR)
    until(mux, lambda: conn.closed)
    assert sock.recv(10) == b"x"
    assert handler.batches == [[b"x"], [None]]


def test_a_method_of_a_subclass_in_python_comes_first(
    mux: muxcore.Mux, connect: Connect, native: ModuleType
) -> None:
    class Mixed(native.Recorder):  # type: ignore[name-defined, misc]
        def on_message(self, conn: Any, message: bytes) -> None:
            self.events.append(("python", message))

    handler = Mixed()
    sock, _ = connect(handler)
    sock.sendall(b"x")
    until(mux, lambda: len(handler.events) > 1)
    assert names(handler) == ["open", "python"]


def test_it_is_handled_in_threads_too(mux: muxcore.Mux, connect: Connect, native: ModuleType) -> None:
    handler = native.Recorder()
    sock, _ = connect(muxcore.Threaded(handler), framer=muxcore.Lines())
    sock.sendall(b"one\n")
    assert receive(mux, sock, 4) == b"one\n"


def test_a_send_of_another_thread(mux: muxcore.Mux, connect: Connect, native: ModuleType) -> None:
    sock, conn = connect(native.Recorder(), framer=muxcore.Lines())
    thread = threading.Thread(target=native.send_now, args=(conn, b"from a thread"))
    thread.start()
    thread.join()
    assert receive(mux, sock, 14) == b"from a thread\n"


def test_a_slow_one_is_named(native: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    with muxcore.Mux(backend="epoll", slow_handler=0.0) as mux:
        listener = mux.listen(LOCALHOST, native.Recorder())
        with socket.create_connection(listener.address, 10):
            until(mux, lambda: caplog.records)
    assert "on_open" in caplog.text


@pytest.mark.parametrize("wrong", [None, object(), 1])
def test_its_functions_refuse_what_is_no_connection(native: ModuleType, wrong: Any) -> None:
    with pytest.raises(TypeError):
        native.send_now(wrong, b"x")


@pytest.mark.parametrize("backend", sorted(set(BACKENDS) - {"epoll"}))
def test_another_backend_refuses_it(native: ModuleType, backend: str) -> None:
    with muxcore.Mux(backend=backend) as mux, pytest.raises(TypeError, match="a NativeHandler needs the epoll backend"):
        mux.listen(LOCALHOST, native.Recorder())


def test_one_without_a_callback_is_refused(mux: muxcore.Mux) -> None:
    with pytest.raises(TypeError, match="NativeHandler overrides no callback"):
        mux.listen(LOCALHOST, muxcore.NativeHandler())


def test_calls_keep_no_reference(mux: muxcore.Mux, native: ModuleType) -> None:
    handler = native.Recorder()
    listener = mux.listen(LOCALHOST, handler)
    counts = []
    for _ in range(2):
        for _ in range(100):
            with socket.create_connection(listener.address, 10) as sock:
                sock.sendall(b"x")
                assert receive(mux, sock, 1) == b"x"
            until(mux, lambda: mux.stats().connections == 0)
            handler.events.clear()
        counts.append((sys.getrefcount(handler), sys.getrefcount(None) // 100))
    assert counts[0][0] == counts[1][0]
    assert counts[1][1] <= counts[0][1] + 1


@beside_the_examples
def test_the_guide_shows_the_example() -> None:
    code = (EXAMPLES / "native" / "echo.pyx").read_text().partition('"""\n\n')[2]
    assert f"```cython\n{code}```" in (EXAMPLES.parent / "docs" / "guides" / "native.md").read_text()


@beside_the_examples
def test_the_example_is_built_as_it_says(tmp_path: Path) -> None:
    shutil.copy(EXAMPLES / "native" / "echo.pyx", tmp_path)
    build = [sys.executable, "-m", "Cython.Build.Cythonize", "-i", "-q", "echo.pyx"]
    subprocess.run(build, cwd=tmp_path, check=True, timeout=120, capture_output=True)
    program = "import echo; echo.serve(0, lambda mux, listener: print(listener.address[1], flush=True))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=env, cwd=tmp_path) as process:
        assert process.stdout is not None
        with until_it_listens(process, int(process.stdout.readline())) as sock:
            sock.sendall(b"hello\n")
            assert sock.recv(100) == b"hello\n"
        process.terminate()
        assert process.wait(20) == 0
