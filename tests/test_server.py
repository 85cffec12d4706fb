"""serve(): signals, drain, threads."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from unittest import mock

import pytest
from support import LOCALHOST, pattern, read_exactly

import muxcore
import muxcore.server

SERVER = """
    import muxcore, sys
    def ready(mux, listener): print(listener.address[1], flush=True)
    def handler(conn, message):
        conn.send(BIG if message[:3] == b"big" else message)
        if message == b"big and stop":
            conn.mux.stop()
    BIG = bytes(8 << 20)
    muxcore.serve(handler, ("127.0.0.1", 0), ready=ready, drain_timeout=DRAIN)
    print("served", flush=True)
"""


def start(drain_timeout: float = 10) -> tuple[subprocess.Popen[str], int]:
    source = textwrap.dedent(SERVER).replace("DRAIN", str(drain_timeout))
    process = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def finish(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    return out


def until_refused(port: int) -> None:
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            return
        except ConnectionResetError:
            pass  # it was in the backlog when the listener closed


@pytest.mark.unix_only("it ends a process by a signal")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_drains_and_returns(number: int) -> None:
    process, port = start()
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(b"hello")
        assert sock.recv(10) == b"hello"
        process.send_signal(number)
        assert sock.recv(10) == b""
    assert finish(process) == "served\n"


@pytest.mark.unix_only("it ends a process by a signal")
def test_output_queued_at_the_signal_still_arrives() -> None:
    process, port = start()
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(b"big")
        got = len(sock.recv(1000))
        process.send_signal(signal.SIGTERM)
        while data := sock.recv(1 << 16):
            got += len(data)
    assert got == 8 << 20
    finish(process)


@pytest.mark.unix_only("it ends a process by a signal")
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_a_parent_forwards_does_not_end_the_drain(first: int, second: int) -> None:
    """Ctrl-C reaches a whole group of processes, and its parent sends another signal to each."""
    process, port = start(drain_timeout=1000)
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(b"big")
        got = len(sock.recv(1000))
        process.send_signal(first)
        until_refused(port)
        process.send_signal(second)
        while data := sock.recv(1 << 16):
            got += len(data)
    assert got == 8 << 20
    assert finish(process) == "served\n"


@pytest.mark.parametrize(
    ("signals", "stops"),
    [
        ([(0, "INT"), (0.9, "INT"), (0.9, "TERM")], 1),
        ([(0, "INT"), (1, "INT")], 1),
        ([(0, "INT"), (1.1, "INT")], 2),
        ([(0, "INT"), (0.5, "INT"), (1.1, "INT")], 2),
        ([(0, "INT"), (1.1, "TERM")], 1),
        ([(0, "INT"), (1.1, "TERM"), (1.2, "TERM")], 2),
        ([(0, "drain"), (0.5, "TERM")], 0),
        ([(0, "drain"), (5, "TERM")], 0),
        ([(0, "drain"), (5, "TERM"), (6, "TERM")], 1),
    ],
)
def test_only_the_same_signal_again_and_later_is_another_request(
    monkeypatch: pytest.MonkeyPatch, signals: list[tuple[float, str]], stops: int
) -> None:
    mux = mock.Mock()
    requests = muxcore.server.Requests(mux)
    for when, name in signals:
        monkeypatch.setattr(muxcore.server, "time", mock.Mock(monotonic=lambda when=when: 1000.0 + when))
        if name == "drain":
            requests.begin()
        else:
            requests(getattr(signal, f"SIG{name}"))
    assert mux.stop.call_count == stops


@pytest.mark.unix_only("it ends a process by a signal")
def test_a_later_signal_ends_the_drain() -> None:
    process, port = start(drain_timeout=1000)
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(b"big")
        got = len(sock.recv(1000))
        process.send_signal(signal.SIGINT)
        until_refused(port)  # it has stopped listening: the first signal has arrived
        while process.poll() is None:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
        assert finish(process) == "served\n"
        assert got > 0


@pytest.mark.unix_only("it ends a process by a signal")
def test_a_signal_behind_a_stop_does_not_end_the_drain() -> None:
    process, port = start(drain_timeout=1000)
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(b"big and stop")
        got = len(sock.recv(1000))
        until_refused(port)
        process.send_signal(signal.SIGTERM)
        while data := sock.recv(1 << 16):
            got += len(data)
    assert got == 8 << 20
    assert finish(process) == "served\n"


def test_serve_needs_nothing_but_a_handler_and_an_address() -> None:
    """In a socket, since nothing else has the port."""
    heard: list[bytes] = []

    def handler(conn: muxcore.Connection, message: bytes) -> None:
        heard.append(message)
        conn.mux.stop()

    sock = socket.create_server(LOCALHOST)
    with socket.create_connection(sock.getsockname()) as peer:
        peer.sendall(b"stop")
        muxcore.serve(handler, sock, drain_timeout=0)
    assert heard == [b"stop"]


def test_in_another_thread_no_signal_handler_is_touched() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    started = threading.Event()
    box: list[Any] = []

    def ready(mux: muxcore.Mux, listener: muxcore.Listener) -> None:
        box.extend((mux, listener.address))
        started.set()

    def serve() -> None:
        muxcore.serve(lambda conn, message: conn.send(message), LOCALHOST, ready=ready)

    thread = threading.Thread(target=serve)
    thread.start()
    assert started.wait(10)
    mux, address = box
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    with socket.create_connection(address) as sock:
        sock.sendall(pattern(1000))
        assert read_exactly(sock, 1000) == pattern(1000)
    mux.stop()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.unix_only("it sends itself a signal")
def test_signal_handlers_are_put_back() -> None:
    def mine(number: int, frame: object) -> None: ...

    before = signal.signal(signal.SIGTERM, mine)
    try:

        def ready(mux: muxcore.Mux, listener: muxcore.Listener) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

        muxcore.serve(lambda conn, message: None, LOCALHOST, ready=ready)
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


async def never_run(mux: muxcore.Mux, listener: muxcore.Listener) -> None:
    raise AssertionError


def generator(mux: muxcore.Mux, listener: muxcore.Listener) -> Iterator[None]:
    raise AssertionError
    yield


class Called:
    async def __call__(self, mux: muxcore.Mux, listener: muxcore.Listener) -> None:
        raise AssertionError


def test_serve_returns_when_a_callback_closes_the_mux() -> None:
    muxcore.serve(lambda conn, message: None, LOCALHOST, ready=lambda mux, listener: mux.call_soon(mux.close))


def test_serve_returns_when_ready_closes_the_mux() -> None:
    muxcore.serve(lambda conn, message: None, LOCALHOST, ready=lambda mux, listener: mux.close())


@pytest.mark.parametrize(
    ("handler", "options", "error", "match"),
    [
        (None, {}, TypeError, "handler must not be None"),
        (print, {"drain_timeout": -1}, ValueError, "drain_timeout"),
        (print, {"backlog": -1}, ValueError, "backlog"),
        (print, {"colour": 1}, TypeError, "colour"),
        (print, {"ready": 1}, TypeError, "ready must be a function"),
        (print, {"ready": never_run}, TypeError, "not a coroutine function: a call would not run its body"),
        (print, {"ready": generator}, TypeError, r"plain function \(mux, listener\), not a generator function"),
        (print, {"ready": Called()}, TypeError, "ready must be a plain function .*, not a coroutine function"),
        (muxcore.Threaded, {}, TypeError, r"pass Threaded\(handler\)"),
        (print, {"timeouts": muxcore.Timeouts}, TypeError, "timeouts must be an instance, not the class"),
        (print, {"limits": muxcore.Limits}, TypeError, "limits must be an instance, not the class"),
    ],
)
def test_bad_arguments_are_named(handler: Any, options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        muxcore.serve(handler, LOCALHOST, **options)


def test_serve_refuses_to_block_a_running_asyncio_loop() -> None:
    async def main() -> None:
        muxcore.serve(print, ("127.0.0.1", 0))

    with pytest.raises(RuntimeError, match=r"serve\(\) would block the running asyncio loop: use muxcore.aio.attach"):
        asyncio.run(main())


def test_serve_has_the_options_of_listen() -> None:
    listen, serve = (inspect.signature(fn).parameters for fn in (muxcore.Mux.listen, muxcore.serve))
    own = {"ready", "drain_timeout"}
    assert {name: one.default for name, one in serve.items() if one.kind is one.KEYWORD_ONLY and name not in own} == {
        name: one.default for name, one in listen.items() if one.kind is one.KEYWORD_ONLY
    }
