"""Threads for blocking work: Mux.run_in_executor and Threaded (Promise blocking-work)."""

from __future__ import annotations

import _thread
import concurrent.futures
import itertools
import operator
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import types
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from support import DEADLINE, LOCALHOST, Recorder, SignalAt, client, exchange, receive, reset, turns, until

import muxcore
from muxcore.threads import surely

Listen = Callable[..., muxcore.Listener]


class Gate:
    """Where a worker waits, as for a slow database, until it is let through."""

    def __init__(self) -> None:
        self.reached = threading.Semaphore(0)
        self.open = threading.Event()

    def wait(self) -> None:
        self.reached.release()
        assert self.open.wait(DEADLINE)

    def until_reached(self) -> None:
        assert self.reached.acquire(timeout=DEADLINE)


@pytest.fixture
def gate() -> Iterator[Gate]:
    """A gate that is open at the end, whatever happens: a worker that waits would keep the interpreter."""
    gate = Gate()
    yield gate
    gate.open.set()


# --- run_in_executor -------------------------------------------------------------------------------


def test_on_done_is_called_in_the_threads_of_the_mux(mux: muxcore.Mux) -> None:
    done: list[Any] = []
    mux.run_in_executor(
        None, lambda *args: (args, threading.get_ident()), 1, 2,
        on_done=lambda future: done.extend((future.result(), threading.get_ident())),
    )
    until(mux, lambda: done)
    (args, worker), here = done
    assert args == (1, 2)
    assert worker != threading.get_ident() == here


def test_the_loop_goes_on_while_a_call_blocks(mux: muxcore.Mux, listen: Listen, gate: Gate) -> None:
    sock = client(listen(lambda conn, message: conn.send(message)))
    future = mux.run_in_executor(None, gate.wait)
    gate.until_reached()
    assert exchange(mux, sock, b"meanwhile") == b"meanwhile"
    assert not future.done()
    sock.close()


def test_an_executor_of_the_users_own_stays_open(mux: muxcore.Mux) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        assert mux.run_in_executor(executor, max, 1, 2).result(DEADLINE) == 2
        mux.close()
        assert executor.submit(max, 3, 4).result(DEADLINE) == 4


def test_an_error_without_on_done_is_logged(mux: muxcore.Mux, caplog: pytest.LogCaptureFixture) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        mux.run_in_executor(executor, int, "x")
    assert "raised in an executor" in caplog.text
    assert "invalid literal" in caplog.text


def test_an_error_that_on_done_gets_is_not_logged(mux: muxcore.Mux, caplog: pytest.LogCaptureFixture) -> None:
    errors: list[Any] = []
    mux.run_in_executor(None, int, "x", on_done=lambda future: errors.append(future.exception()))
    until(mux, lambda: errors)
    assert isinstance(errors[0], ValueError)
    assert not caplog.records


def test_close_shuts_the_default_executor_down_without_waiting(backend: str, gate: Gate) -> None:
    called: list[object] = []
    with muxcore.Mux(backend=backend) as mux:
        running = mux.run_in_executor(None, gate.wait, on_done=called.append)
        gate.until_reached()
    assert not running.done()
    gate.open.set()
    assert running.result(DEADLINE) is None
    assert called == [], "the Mux is closed"
    with pytest.raises(RuntimeError, match="closed"):
        mux.run_in_executor(None, print)


def test_close_cancels_what_waits_for_a_thread(backend: str, gate: Gate) -> None:
    with muxcore.Mux(backend=backend) as mux:
        futures = [mux.run_in_executor(None, gate.wait) for _ in range(100)]  # there are 32 threads at most
    assert futures[-1].cancelled()


def test_a_result_without_on_done_is_not_logged(
    mux: muxcore.Mux, caplog: pytest.LogCaptureFixture
) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        mux.run_in_executor(executor, int, "5")
    assert not caplog.records


def test_calls_without_an_executor_share_one(mux: muxcore.Mux, gate: Gate) -> None:
    def name() -> str:
        gate.wait()
        return threading.current_thread().name

    futures = [mux.run_in_executor(None, name) for _ in range(2)]
    for _ in futures:
        gate.until_reached()
    gate.open.set()
    assert {future.result(DEADLINE) for future in futures} == {"muxcore_1", "muxcore_2"}


@pytest.mark.parametrize("what", ["submit", "close"])
def test_a_signal_handler_may_submit_or_close_amid_a_submit(backend: str, what: str) -> None:
    """Promise any-user-code: Python runs signal handlers between any two lines."""
    tracer = sys.gettrace()
    left = at = 0
    futures: list[Any] = []

    def act_at(frame: Any, event: str, arg: object) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            sys.settrace(tracer)
            if what == "submit":
                futures.append(mux.run_in_executor(None, max, 3, 4))
            else:
                mux.close()
        return act_at

    while left <= 0:  # until the last line of a submit is passed
        left = at = at + 5
        with muxcore.Mux(backend=backend) as mux, suppress(RuntimeError):
            sys.settrace(act_at)
            try:
                futures.append(mux.run_in_executor(None, max, 1, 2))
            finally:
                sys.settrace(tracer)
            if what == "submit":
                assert {future.result(DEADLINE) for future in futures} <= {2, 4}
            del futures[:]
    assert at > 50


def test_the_exit_of_the_interpreter_waits_for_a_job() -> None:
    code = """
        import threading
        import muxcore

        def job():
            threading.main_thread().join()
            print("written")

        muxcore.Mux().run_in_executor(None, job)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("written\n", "")


def test_a_call_that_was_cancelled_is_no_error(
    mux: muxcore.Mux, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        mux.run_in_executor(executor, gate.wait)
        gate.until_reached()
        assert mux.run_in_executor(executor, print).cancel()
        gate.open.set()
    assert not caplog.records


@pytest.mark.parametrize(
    ("args", "options", "match"),
    [
        ((5, print), {}, "executor"),
        ((None, 5), {}, "fn"),
        ((None, print), {"on_done": 5}, "on_done"),
    ],
)
def test_bad_arguments_of_run_in_executor_are_named(
    mux: muxcore.Mux, args: Any, options: Any, match: str
) -> None:
    with pytest.raises(TypeError, match=match):
        mux.run_in_executor(*args, **options)


# --- Threaded --------------------------------------------------------------------------------------


def test_messages_are_handled_in_other_threads_and_other_callbacks_in_that_of_the_mux(
    mux: muxcore.Mux, listen: Listen
) -> None:
    seen: list[tuple[str, bool]] = []

    class Seen(muxcore.Handler):
        def note(self, name: str) -> None:
            seen.append((name, threading.current_thread() is threading.main_thread()))

        def on_open(self, conn: muxcore.Connection) -> None:
            self.note("open")

        def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
            self.note("message")
            conn.send(message)

        def on_eof(self, conn: muxcore.Connection) -> None:
            self.note("eof")
            conn.close()

        def on_close(self, conn: muxcore.Connection, exc: BaseException | None) -> None:
            self.note("close")

    with client(listen(muxcore.Threaded(Seen()))) as sock:
        assert exchange(mux, sock, b"hello") == b"hello"
        sock.shutdown(socket.SHUT_WR)
        assert receive(mux, sock) == b""
    until(mux, lambda: len(seen) == 4)
    assert seen == [("open", True), ("message", False), ("eof", True), ("close", True)]


def test_on_drain_comes_in_the_thread_of_the_mux(mux: muxcore.Mux, listen: Listen) -> None:
    drained: list[threading.Thread] = []

    class Large(muxcore.Handler):
        def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
            conn.send(bytes(8 << 20))

        def on_drain(self, conn: muxcore.Connection) -> None:
            drained.append(threading.current_thread())

    with client(listen(muxcore.Threaded(Large()))) as sock:
        sock.sendall(b"x")
        assert len(receive(mux, sock, 8 << 20)) == 8 << 20
        until(mux, lambda: drained)
    assert drained == [threading.main_thread()]


def test_messages_of_one_connection_are_handled_in_order(mux: muxcore.Mux, listen: Listen) -> None:
    lines = [b"%d" % i for i in range(2000)]
    handler = muxcore.Threaded(lambda conn, message: conn.send(message), queue=5)
    with client(listen(handler, framer=muxcore.Lines())) as sock:
        data = b"".join(line + b"\n" for line in lines)
        assert exchange(mux, sock, data) == data


def test_connections_are_handled_in_parallel(mux: muxcore.Mux, listen: Listen) -> None:
    meet = threading.Barrier(3, timeout=DEADLINE)

    def handler(conn: muxcore.Connection, message: bytes) -> None:
        meet.wait()
        conn.send(message)

    listener = listen(muxcore.Threaded(handler, threads=3))
    socks = [client(listener) for _ in range(3)]
    for sock in socks:
        sock.sendall(b"x")
    for sock in socks:
        assert receive(mux, sock, 1) == b"x"
        sock.close()


def test_one_connection_has_one_thread_at_a_time(mux: muxcore.Mux, listen: Listen) -> None:
    busy = threading.Lock()

    def handler(conn: muxcore.Connection, message: bytes) -> None:
        assert busy.acquire(blocking=False)
        conn.send(message)
        busy.release()

    with client(listen(muxcore.Threaded(handler), framer=muxcore.Fixed(1))) as sock:
        for _ in range(20):
            assert exchange(mux, sock, bytes(50)) == bytes(50)
    assert mux.stats().handler_errors == 0


def test_on_messages_gets_what_has_come_meanwhile(mux: muxcore.Mux, listen: Listen, gate: Gate) -> None:
    batches: list[list[bytes]] = []

    class Batches(muxcore.Handler):
        def on_messages(self, conn: muxcore.Connection, messages: list[bytes]) -> None:
            batches.append(messages)
            gate.wait()
            conn.send_many(messages)

    with client(listen(muxcore.Threaded(Batches()), framer=muxcore.Fixed(1))) as sock:
        sock.sendall(b"a")
        until(mux, lambda: gate.reached.acquire(blocking=False))
        for data in (b"b", b"cd"):
            before = mux.stats().messages_in
            sock.sendall(data)
            until(mux, lambda before=before, data=data: mux.stats().messages_in == before + len(data))
        gate.open.set()
        assert receive(mux, sock, 4) == b"abcd"
    assert batches == [[b"a"], [b"b", b"c", b"d"]]


def test_a_connection_with_a_full_queue_is_not_read_from(mux: muxcore.Mux, listen: Listen, gate: Gate) -> None:
    def handler(conn: muxcore.Connection, message: bytes) -> None:
        gate.wait()
        conn.send(message)

    recorder = Recorder()
    recorder.on_message = handler  # type: ignore[method-assign]
    with client(listen(muxcore.Threaded(recorder, queue=2), framer=muxcore.Fixed(1))) as sock:
        sock.sendall(b"0123456789")
        until(mux, lambda: recorder.connections and not recorder.connections[0].is_reading())
        gate.until_reached()
        assert mux.stats().messages_in <= 4, "one in its thread, two waiting, and the one too many"
        sock.sendall(b"ab")
        assert turns(mux, 0.02) == 0
        gate.open.set()
        assert receive(mux, sock, 12) == b"0123456789ab"
        until(mux, lambda: recorder.connections[0].is_reading())  # its thread reports its end after the reply


def test_a_connection_whose_queue_is_just_full_is_read_from(mux: muxcore.Mux, listen: Listen, gate: Gate) -> None:
    recorder = Recorder()
    recorder.on_message = lambda conn, message: gate.wait()  # type: ignore[method-assign]
    with client(listen(muxcore.Threaded(recorder, queue=1), framer=muxcore.Fixed(1))) as sock:
        sock.sendall(b"1")
        until(mux, lambda: gate.reached.acquire(blocking=False))
        [conn] = recorder.connections
        sock.sendall(b"2")
        until(mux, lambda: mux.stats().messages_in == 2)
        assert conn.is_reading()
        sock.sendall(b"3")
        until(mux, lambda: not conn.is_reading())


def test_eof_is_acted_on_after_the_last_reply(mux: muxcore.Mux, listen: Listen, gate: Gate) -> None:
    """Promise half-close: offloaded work counts as queued."""

    def handler(conn: muxcore.Connection, message: bytes) -> None:
        gate.wait()
        conn.send(message)

    with client(listen(muxcore.Threaded(handler), framer=muxcore.Fixed(1))) as sock:
        sock.sendall(b"abc")
        sock.shutdown(socket.SHUT_WR)
        [conn] = until_connected(mux)
        until(mux, lambda: conn.eof)
        gate.until_reached()
        turns(mux, 0.02)
        assert not conn.closing
        gate.open.set()
        assert receive(mux, sock) == b"abc"
    until(mux, lambda: conn.closed)
    assert conn.error is None


def test_eof_of_a_connection_does_not_wait_for_the_work_of_another(
    mux: muxcore.Mux, listen: Listen, gate: Gate
) -> None:
    with client(listen(muxcore.Threaded(lambda conn, message: gate.wait()))) as working:
        working.sendall(b"x")
        until(mux, lambda: mux.stats().messages_in)
        gate.until_reached()
        with client(listen(Recorder())) as sock:
            sock.shutdown(socket.SHUT_WR)
            assert receive(mux, sock) == b""
        gate.open.set()


def until_connected(mux: muxcore.Mux) -> list[muxcore.Connection]:
    until(mux, lambda: len(mux.connections))
    return list(mux.connections)


def test_on_eof_comes_after_the_last_message(mux: muxcore.Mux, listen: Listen, gate: Gate) -> None:
    events: list[str] = []

    class Half(muxcore.Handler):
        def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
            gate.wait()
            events.append("message")

        def on_eof(self, conn: muxcore.Connection) -> None:
            events.append("eof")
            conn.send(b"the end")
            conn.close()

    with client(listen(muxcore.Threaded(Half()))) as sock:
        sock.sendall(b"x")
        sock.shutdown(socket.SHUT_WR)
        [conn] = until_connected(mux)
        until(mux, lambda: conn.eof)
        assert events == []
        gate.open.set()
        assert receive(mux, sock) == b"the end"
    assert events == ["message", "eof"]


def test_half_open_connections_outlive_eof(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder(reply=lambda message: message)
    with client(listen(muxcore.Threaded(recorder), half_open=True)) as sock:
        sock.sendall(b"x")
        sock.shutdown(socket.SHUT_WR)
        assert receive(mux, sock, 1) == b"x"
        turns(mux, 0.02)
        recorder.connections[0].send(b"later")
        recorder.connections[0].close()
        assert receive(mux, sock) == b"later"


def test_a_handler_that_raises_loses_its_connection_only(
    mux: muxcore.Mux, listen: Listen, caplog: pytest.LogCaptureFixture
) -> None:
    """Promise handler-raises: what it sent before still arrives; what came after the message is not handled."""
    recorder = Recorder()
    handled: list[bytes] = []

    def handler(conn: muxcore.Connection, message: bytes) -> None:
        handled.append(message)
        conn.send(message)
        if message == b"!":
            raise ValueError("no such key")

    recorder.on_message = handler  # type: ignore[method-assign]
    listener = listen(muxcore.Threaded(recorder), framer=muxcore.Fixed(1))
    with client(listener) as sock, client(listener) as other:
        sock.sendall(b"a!bc")
        assert receive(mux, sock) == b"a!"
        assert exchange(mux, other, b"ok") == b"ok"
    until(mux, lambda: recorder.count("close") == 2)
    errors = [arg for name, _, arg in recorder.events if name == "close" and arg is not None]
    assert [str(error) for error in errors] == ["no such key"]
    assert handled == [b"a", b"!", b"o", b"k"]
    assert "no such key" in caplog.text
    assert mux.stats().handler_errors == 1


def test_system_exit_in_a_thread_ends_the_loop(mux: muxcore.Mux, listen: Listen) -> None:
    def handler(conn: muxcore.Connection, message: bytes) -> None:
        raise SystemExit(3)

    with client(listen(muxcore.Threaded(handler))) as sock:
        sock.sendall(b"x")
        with pytest.raises(SystemExit):
            mux.run()
        [conn] = mux.connections
        assert not conn.closing


@pytest.mark.parametrize("ends", ["reset", "abort", "close"])
def test_when_a_connection_ends_its_work_is_dropped(
    mux: muxcore.Mux, listen: Listen, gate: Gate, ends: str
) -> None:
    """No callback comes after on_close; what the message in its thread sends is counted as dropped."""
    recorder = Recorder()
    sent: list[bool] = []

    def handler(conn: muxcore.Connection, message: bytes) -> None:
        recorder.events.append(("message", conn.id, message))
        gate.wait()
        sent.append(conn.send(message))

    recorder.on_message = handler  # type: ignore[method-assign]
    sock = client(listen(muxcore.Threaded(recorder), framer=muxcore.Fixed(1)))
    sock.sendall(b"ab")
    until(mux, lambda: mux.stats().messages_in == 2)
    gate.until_reached()
    if ends == "reset":
        reset(sock)
    else:
        getattr(recorder.connections[0], ends)()
        sock.close()
    until(mux, lambda: recorder.count("close"))
    gate.open.set()
    until(mux, lambda: sent)
    turns(mux, 0.02)
    assert recorder.names() == ["open", "message", "close"]
    assert sent == [False]
    assert mux.stats().drops == 1


def test_a_worker_may_close_its_connection(mux: muxcore.Mux, listen: Listen) -> None:
    handled: list[bytes] = []

    def handler(conn: muxcore.Connection, message: bytes) -> None:
        handled.append(message)
        conn.write(b"bye")
        conn.close()

    with client(listen(muxcore.Threaded(handler), framer=muxcore.Fixed(1))) as sock:
        sock.sendall(b"abc")
        assert receive(mux, sock) == b"bye"
        turns(mux, 0.02)
        assert turns(mux, 0.05) == 0, "the messages that remain cost nothing during the linger"
    assert handled == [b"a"]


def test_drain_waits_for_the_messages_that_have_come(mux: muxcore.Mux, listen: Listen, gate: Gate) -> None:
    def handler(conn: muxcore.Connection, message: bytes) -> None:
        gate.wait()
        conn.send(message)

    with client(listen(muxcore.Threaded(handler), framer=muxcore.Fixed(1))) as sock:
        sock.sendall(b"abc")
        until(mux, lambda: mux.stats().messages_in == 3)
        gate.until_reached()
        mux.call_soon(sock.sendall, b"too late")
        mux.call_later(0.02, gate.open.set)
        mux.call_later(0.05, sock.shutdown, socket.SHUT_WR)
        assert mux.drain(DEADLINE)
        assert receive(mux, sock) == b"abc"


def test_drain_gives_up_work_that_lasts_too_long(mux: muxcore.Mux, listen: Listen, gate: Gate) -> None:
    with client(listen(muxcore.Threaded(lambda conn, message: gate.wait()))) as sock:
        sock.sendall(b"x")
        until(mux, lambda: gate.reached.acquire(blocking=False))
        assert not mux.drain(0.02)
        assert len(mux.connections) == 1


def test_closing_the_mux_drops_what_is_in_work(backend: str, gate: Gate) -> None:
    recorder = Recorder()
    recorder.on_message = lambda conn, message: gate.wait()  # type: ignore[method-assign]
    handler = muxcore.Threaded(recorder)
    with muxcore.Mux(backend=backend) as mux, client(mux.listen(LOCALHOST, handler)) as sock:
        sock.sendall(b"x")
        until(mux, lambda: gate.reached.acquire(blocking=False))
        mux.close()
        assert recorder.names() == ["open", "close"]
        gate.open.set()
        handler._pool.shutdown()  # its thread has handled the message, and the Mux was closed
    assert recorder.names() == ["open", "close"]


def test_a_peer_that_waits_for_us_is_not_idle(mux: muxcore.Mux, listen: Listen, gate: Gate) -> None:
    recorder = Recorder()
    recorder.on_message = lambda conn, message: gate.wait()  # type: ignore[method-assign]
    with client(listen(muxcore.Threaded(recorder), timeouts=muxcore.Timeouts(idle=0.05, linger=0))) as sock:
        sock.sendall(b"x")
        until(mux, lambda: gate.reached.acquire(blocking=False))
        turns(mux, 0.2)
        assert recorder.names() == ["open"]
        gate.open.set()
        until(mux, lambda: recorder.count("close"))
    assert isinstance(recorder.reason(), muxcore.IdleTimeout)


def test_a_peer_has_its_time_once_its_message_is_handled(mux: muxcore.Mux, listen: Listen, gate: Gate) -> None:
    recorder = Recorder()
    recorder.on_message = lambda conn, message: gate.wait()  # type: ignore[method-assign]
    with client(listen(muxcore.Threaded(recorder), timeouts=muxcore.Timeouts(idle=0.3, linger=0))) as sock:
        sock.sendall(b"x")
        until(mux, lambda: gate.reached.acquire(blocking=False))
        turns(mux, 0.5)
        start = time.monotonic()
        gate.open.set()
        until(mux, lambda: recorder.count("close"))
        assert time.monotonic() - start >= 0.3


def test_what_comes_while_drain_waits_for_a_thread_is_left_alone(
    mux: muxcore.Mux, listen: Listen, gate: Gate
) -> None:
    with client(listen(muxcore.Threaded(lambda conn, message: gate.wait()))) as sock:
        sock.sendall(b"work")
        until(mux, lambda: gate.reached.acquire(blocking=False))
        sock.sendall(b"more")
        before = mux.stats().waits
        assert not mux.drain(0.1)
        assert mux.stats().waits - before < 10, "no spin"


def test_write_eof_does_not_end_a_connection_whose_messages_are_in_work(
    mux: muxcore.Mux, listen: Listen, gate: Gate
) -> None:
    handled: list[bytes] = []

    class Handler(Recorder):
        def on_open(self, conn: muxcore.Connection) -> None:
            super().on_open(conn)
            conn.write_eof()

        def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
            gate.wait()
            handled.append(message)

    recorder = Handler()
    with client(listen(muxcore.Threaded(recorder), framer=muxcore.Fixed(1))) as sock:
        sock.sendall(b"ab")
        sock.shutdown(socket.SHUT_WR)
        until(mux, lambda: recorder.connections and recorder.connections[0].eof)
        turns(mux, 0.02)
        assert recorder.names() == ["open"]
        gate.open.set()
        until(mux, lambda: recorder.count("close"))
    assert handled == [b"a", b"b"]


def test_a_function_in_threads_is_not_called_for_the_end(mux: muxcore.Mux, listen: Listen) -> None:
    with client(listen(muxcore.Threaded(lambda conn, message: conn.send(message)))) as sock:
        assert exchange(mux, sock, b"x") == b"x"
    until(mux, lambda: mux.stats().connections == 0)
    assert mux.stats().handler_errors == 0


def test_the_next_message_does_not_wait_for_the_thread_of_the_last(
    mux: muxcore.Mux, listen: Listen, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Mux may learn that a message is handled before its job is marked as done."""
    from muxcore._pool import Job

    both = threading.Event()

    def slow(job: Any, result: Any) -> None:
        both.wait(DEADLINE)
        concurrent.futures.Future.set_result(job, result)

    def handler(conn: muxcore.Connection, message: bytes) -> None:
        gate.wait()
        conn.send(message)

    monkeypatch.setattr(Job, "set_result", slow, raising=False)
    try:
        with client(listen(muxcore.Threaded(handler), framer=muxcore.Fixed(1))) as sock:
            sock.sendall(b"a")
            until(mux, lambda: gate.reached.acquire(blocking=False))
            sock.sendall(b"b")
            until(mux, lambda: mux.stats().messages_in == 2)
            gate.open.set()
            assert receive(mux, sock, 2) == b"ab"
    finally:
        both.set()


def test_a_job_that_was_begun_twice_works_once(
    mux: muxcore.Mux, listen: Listen, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt came when the job was in the pool, and the Mux had not noted that yet."""
    from muxcore._pool import Pool

    submit = Pool.submit
    held: list[Any] = []

    def interrupted(pool: Any, *args: Any) -> Any:
        held.append(args)
        if len(held) == 1:
            raise KeyboardInterrupt
        monkeypatch.setattr(Pool, "submit", submit)
        return [submit(pool, *args) for args in held][1]

    def handler(conn: muxcore.Connection, message: bytes) -> None:
        gate.wait()
        conn.send(message)

    monkeypatch.setattr(Pool, "submit", interrupted)
    threaded = muxcore.Threaded(handler, threads=2)
    with client(listen(threaded, framer=muxcore.Fixed(1))) as sock:
        sock.sendall(b"ab")
        with pytest.raises(KeyboardInterrupt):
            until(mux, lambda: False)
        until(mux, lambda: gate.reached.acquire(blocking=False))
        assert threaded._pool.submit(max, 1, 2).result(DEADLINE / 4) == 2, "the other thread has nothing to do"
        gate.open.set()
        assert receive(mux, sock, 2) == b"ab"


def test_a_job_that_ends_twice_leaves_the_next_one_in_work(mux: muxcore.Mux, listen: Listen, gate: Gate) -> None:
    """It was begun twice, since an interrupt came; and then the next message."""
    first = Gate()

    def handler(conn: muxcore.Connection, message: bytes) -> None:
        (first if message == b"1" else gate).wait()
        conn.send(message)

    threaded = muxcore.Threaded(handler)
    with client(listen(threaded, framer=muxcore.Fixed(1))) as sock:
        sock.sendall(b"1")
        until(mux, lambda: first.reached.acquire(blocking=False))
        [work] = mux._offloaded.values()
        first.open.set()
        assert receive(mux, sock, 1) == b"1"
        until(mux, lambda: not mux._offloaded)
        sock.sendall(b"2")
        until(mux, lambda: gate.reached.acquire(blocking=False))
        mux.call_soon(threaded._ended, work, work.runs)
        sock.shutdown(socket.SHUT_WR)
        turns(mux, 0.02)
        gate.open.set()
        assert receive(mux, sock) == b"2"


def test_what_waits_behind_a_message_in_work_is_not_lost_to_an_interrupt(
    mux: muxcore.Mux, listen: Listen, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    from muxcore._pool import Pool

    def handler(conn: muxcore.Connection, message: bytes) -> None:
        gate.wait()
        conn.send(message)

    with client(listen(muxcore.Threaded(handler), framer=muxcore.Fixed(1))) as sock:
        sock.sendall(b"a")
        until(mux, lambda: gate.reached.acquire(blocking=False))
        sock.sendall(b"b")
        until(mux, lambda: mux.stats().messages_in == 2)
        submit = Pool.submit

        def interrupted(pool: Any, *args: Any) -> Any:
            monkeypatch.setattr(Pool, "submit", submit)
            raise KeyboardInterrupt

        monkeypatch.setattr(Pool, "submit", interrupted)
        gate.open.set()
        with pytest.raises(KeyboardInterrupt):
            until(mux, lambda: False)
        assert receive(mux, sock, 2) == b"ab"


def test_what_a_worker_may_not_do_costs_the_connection(
    mux: muxcore.Mux, listen: Listen, caplog: pytest.LogCaptureFixture
) -> None:
    with client(listen(muxcore.Threaded(lambda conn, message: conn.pause_reading()))) as sock:
        sock.sendall(b"x")
        assert receive(mux, sock) == b""
    assert "belongs to the thread" in caplog.text


@pytest.mark.parametrize(
    ("handler", "options", "error", "match"),
    [
        (muxcore.Handler(), {}, TypeError, "on_message"),
        (Recorder, {}, TypeError, "instance"),
        (print, {"threads": 0}, ValueError, "threads"),
        (print, {"queue": 0}, ValueError, "queue"),
        (print, {"queue": "1"}, TypeError, "queue"),
    ],
)
def test_bad_arguments_of_threaded_are_named(handler: Any, options: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        muxcore.Threaded(handler, **options)


@pytest.mark.unix_only("it ends a process by a signal")
def test_serve_lets_its_threads_finish() -> None:
    source = """
        import muxcore, os, signal, sys, threading
        main = os.getpid()
        def slow(conn, message):
            os.kill(main, signal.SIGTERM)
            while not box[0].closed: threading.Event().wait(0.001)
            conn.send(b"the reply")
        box = []
        def ready(mux, listener):
            box.append(listener)
            print(listener.address[1], flush=True)
        muxcore.serve(muxcore.Threaded(slow), ("127.0.0.1", 0), ready=ready)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(source)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with socket.create_connection(("127.0.0.1", int(process.stdout.readline()))) as sock:
        sock.sendall(b"x")
        assert sock.recv(100) == b"the reply"
        assert sock.recv(100) == b""
    process.communicate(timeout=20)
    assert process.returncode == 0


# --- its hold, and interrupts ----------------------------------------------------------------------


def test_a_full_queue_does_not_undo_the_users_pause(mux: muxcore.Mux, listen: Listen, gate: Gate) -> None:
    recorder = Recorder()

    def slow(conn: muxcore.Connection, message: bytes) -> None:
        gate.wait()
        Recorder.on_message(recorder, conn, message)

    recorder.on_message = slow  # type: ignore[method-assign]
    with client(listen(muxcore.Threaded(recorder, queue=1), framer=muxcore.Fixed(1))) as sock:
        sock.sendall(b"123")
        until(mux, lambda: recorder.connections)
        [conn] = recorder.connections
        until(mux, lambda: not conn.is_reading())
        conn.pause_reading()
        gate.open.set()
        until(mux, lambda: not mux._offloaded)
        sock.sendall(b"4")
        turns(mux, 0.05)
        assert not conn.is_reading()
        before = recorder.received()
        assert b"4" not in before
        conn.resume_reading()
        until(mux, lambda: recorder.received() == b"1234")


def test_resuming_does_not_undo_a_full_queue(mux: muxcore.Mux, listen: Listen, gate: Gate) -> None:
    recorder = Recorder()
    recorder.on_message = lambda conn, message: gate.wait()  # type: ignore[method-assign]
    with client(listen(muxcore.Threaded(recorder, queue=1), framer=muxcore.Fixed(1))) as sock:
        sock.sendall(b"123")
        until(mux, lambda: recorder.connections and not recorder.connections[0].is_reading())
        [conn] = recorder.connections
        conn.pause_reading()
        conn.resume_reading()
        assert not conn.is_reading()
        gate.open.set()
        until(mux, conn.is_reading)


@pytest.mark.parametrize("step", ["_take", "_start"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_threaded_has_accepted_is_not_lost_to_an_interrupt(
    mux: muxcore.Mux, listen: Listen, monkeypatch: pytest.MonkeyPatch, when: str, step: str
) -> None:
    take_or_start = getattr(muxcore.Threaded, step)

    def interrupted(threaded: Any, *args: Any) -> Any:
        monkeypatch.setattr(muxcore.Threaded, step, take_or_start)
        if when == "after":
            take_or_start(threaded, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(muxcore.Threaded, step, interrupted)
    listener = listen(muxcore.Threaded(lambda conn, message: conn.send(message)))
    with client(listener) as sock:
        sock.sendall(b"abc")
        with pytest.raises(KeyboardInterrupt):
            until(mux, lambda: False)
        assert receive(mux, sock, 3) == b"abc"
    assert mux.drain(DEADLINE)


class Slow(Recorder):
    """An echo that waits for its gate."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.gate = gate

    def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
        self.gate.wait()
        super().on_message(conn, message)
        conn.send(message)


class SlowLists(Slow):
    def on_messages(self, conn: muxcore.Connection, messages: list[bytes]) -> None:
        for message in messages:
            self.on_message(conn, message)


def until_idle(threaded: muxcore.Threaded) -> None:
    """Until no thread has anything to do."""
    end = time.monotonic() + DEADLINE
    while threaded._pool._jobs or any(thread._job for thread in threaded._pool._living()):
        assert time.monotonic() < end
        time.sleep(0.0002)


def run_all(steps: deque[Callable[[], object]]) -> None:
    """Each, and again the one that an interrupt has ended."""
    while steps:
        steps[0]()
        steps.popleft()


def messages_with_an_interrupt(backend: str, recorder: Slow, n: int) -> SignalAt:
    """Four messages, while the n-th step of Threaded in the Mux's thread is interrupted."""
    threaded, gate = muxcore.Threaded(recorder, threads=1, queue=1), recorder.gate
    ours, theirs = socket.socketpair()
    with muxcore.Mux(backend=backend) as mux, theirs:
        mux.attach(ours, threaded, framer=muxcore.Lines())
        steps: deque[Callable[[], object]] = deque((
            lambda: theirs.sendall(b"1\n"),
            lambda: until(mux, lambda: gate.reached.acquire(blocking=False)),
            lambda: theirs.sendall(b"2\n3\n"),
            lambda: turns(mux, 0.003),
            gate.open.set,
            lambda: until_idle(threaded),
            lambda: until(mux, lambda: not mux._offloaded),
            lambda: theirs.sendall(b"4\n"),
            lambda: until(mux, lambda: recorder.count("message") == 4),
        ))
        with SignalAt("threads.py", n) as interrupt:
            run_all(steps)
        if not (interrupt.entry and interrupt.where in ("on_message", "_on_messages")):
            run_all(steps)
            assert receive(mux, theirs, 8) == b"1\n2\n3\n4\n", (n, interrupt.where)
            theirs.close()
            assert mux.drain(DEADLINE), (n, interrupt.where)
            assert recorder.names()[-1] == "close"
        gate.open.set()
    threaded._pool.shutdown()
    return interrupt


@pytest.mark.parametrize("kind", [Slow, SlowLists])
def test_an_interrupt_at_any_step_loses_no_message_for_a_thread(backend: str, kind: type[Slow]) -> None:
    """Except at the entry of the callback itself: that message is the handler's, as with any handler."""
    places = set()
    for n in itertools.count():
        interrupt = messages_with_an_interrupt(backend, kind(Gate()), n)
        if interrupt.left >= 0:
            break
        places.add(interrupt.where)
    assert {"_ended", "_go_on", "_calls", "_offload", "_take", "_start"} <= places


@pytest.mark.unix_only("SIGUSR1")
def test_a_signal_that_comes_as_a_step_begins_has_it_made_again() -> None:
    """Where the generator goes on, its `try` has begun: this is about CPython, and so with a real signal."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    mux = types.SimpleNamespace(_soon=[])
    made: list[int] = []
    before = signal.signal(signal.SIGUSR1, interrupted)
    try:
        step = surely(mux, made.append, 1)  # type: ignore[arg-type]
        with pytest.raises(KeyboardInterrupt):  # all in C, so that nothing looks for signals before the step
            list(map(operator.call, (partial(_thread.interrupt_main, signal.SIGUSR1), step)))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert made == []
    [(again, args)] = mux._soon
    again(*args)
    assert made == [1]


@pytest.mark.parametrize("where", ["_calls", "_ended", "_go_on"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_a_signal_handler_raises_as_a_job_ends_stalls_no_connection(
    mux: muxcore.Mux, gate: Gate, caplog: pytest.LogCaptureFixture, where: str, error: type[BaseException]
) -> None:
    """At the entry of a function, too, where it can catch nothing."""
    recorder, (ours, theirs) = Slow(gate), socket.socketpair()
    threaded = muxcore.Threaded(recorder, threads=1)
    mux.attach(ours, threaded, framer=muxcore.Lines())
    theirs.sendall(b"1\n")
    until(mux, lambda: gate.reached.acquire(blocking=False))
    theirs.sendall(b"2\n")
    turns(mux, 0.02)
    gate.open.set()
    until_idle(threaded)
    raised = False

    def trace(frame: Any, event: str, arg: Any) -> None:
        nonlocal raised
        if event == "call" and frame.f_code.co_name == where and not raised:
            raised = True
            raise error("a signal handler")

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        mux.poll(0)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    assert raised
    assert receive(mux, theirs, 4) == b"1\n2\n"
    theirs.close()
    assert mux.drain(DEADLINE)
    assert recorder.names()[-1] == "close"


@pytest.mark.unix_only("it forks")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_that_a_handler_forks_in_its_thread_handles_no_message(mux: muxcore.Mux) -> None:
    handled: list[bytes] = []
    pids: list[int] = []
    release = threading.Event()
    parent = os.getpid()
    reader, writer = os.pipe()

    def handle(conn: muxcore.Connection, message: bytes) -> None:
        if os.getpid() != parent:
            os.write(writer, message)
        if message == b"wait":
            release.wait()
        if message == b"fork":
            pids.append(os.fork())
        handled.append(message)

    ours, theirs = socket.socketpair()
    mux.attach(ours, muxcore.Threaded(handle, threads=1), framer=muxcore.Lines())
    theirs.sendall(b"wait\n")
    turns(mux, 0.05)
    theirs.sendall(b"fork\none\ntwo\n")
    turns(mux, 0.05)
    release.set()
    until(mux, lambda: len(handled) == 4)
    turns(mux, 0.1)
    os.kill(pids[0], signal.SIGKILL)
    os.waitpid(pids[0], 0)
    os.close(writer)
    handled_there = os.read(reader, 100)
    os.close(reader)
    assert handled_there == b""
    theirs.close()


class Apologizes(Recorder):
    """Replies to each message, and to what is wrong."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.gate = gate

    def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
        self.gate.wait()
        if message == b"bad":
            raise muxcore.FrameError("a bad message")
        conn.send(message)

    def on_error(self, conn: muxcore.Connection, exc: muxcore.FrameError) -> None:
        self.events.append(("error", threading.get_ident(), exc))
        conn.send(b"sorry")


def test_a_frame_error_of_a_handler_in_a_thread_may_be_replied_to(
    mux: muxcore.Mux, listen: Listen, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    """Promise frame-errors."""
    gate.open.set()
    with client(listen(muxcore.Threaded(recorder := Apologizes(gate)), framer=muxcore.Lines())) as sock:
        sock.sendall(b"good\nbad\nlost\n")
        assert receive(mux, sock) == b"good\nsorry\n"
    until(mux, lambda: recorder.count("close"))
    assert isinstance(recorder.reason(), muxcore.FrameError)
    assert recorder.events[1][1] == threading.get_ident()
    assert mux.stats().handler_errors == len(caplog.records) == 0


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("framer", [muxcore.Lines(4), muxcore.LengthPrefix(1, max_size=4)], ids=repr)
def test_what_is_wrong_behind_messages_in_threads_waits_for_their_replies(
    mux: muxcore.Mux, listen: Listen, gate: Gate, framer: Any, ends: bool
) -> None:
    """Promise frame-errors: replies to what came before still arrive. And while it waits, the loop sleeps."""
    sent, replies = b"a\nb\ntoo long\n", b"a\nb\nsorry\n"
    if isinstance(framer, muxcore.LengthPrefix):
        sent, replies = b"\1a\1b\5large", b"\1a\1b\5sorry"
    with client(listen(muxcore.Threaded(recorder := Apologizes(gate)), framer=framer)) as sock:
        sock.sendall(sent)
        if ends:
            sock.shutdown(socket.SHUT_WR)
        while not gate.reached.acquire(blocking=False):
            mux.poll(0.02)
        waits = mux.stats().waits
        turns(mux, 0.2)
        assert mux.stats().waits - waits < 20
        assert recorder.names() == ["open"]
        gate.open.set()
        assert receive(mux, sock) == replies
    until(mux, lambda: recorder.count("close"))
    assert recorder.names() == ["open", "error", "close"]
    assert isinstance(recorder.reason(), muxcore.FrameTooLarge)


@pytest.mark.parametrize("wrong", [False, True])
def test_on_eof_and_on_error_come_behind_the_last_reply_of_a_thread(
    mux: muxcore.Mux, listen: Listen, gate: Gate, wrong: bool
) -> None:
    """A second run of a thread may end before the Mux's thread has handled the end of the first."""

    class Two(Apologizes):
        def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
            self.gate.wait()
            conn.send(message)
            if message == b"1":
                conn.mux.call_soon_threadsafe(second, conn)
            elif wrong:
                raise muxcore.FrameError

        def on_eof(self, conn: muxcore.Connection) -> None:
            conn.send(b"sorry")
            conn.close()

    def second(conn: Any) -> None:
        """In the Mux's thread, before that of the first."""
        work = conn.mux._offloaded[conn]
        work.job.result(DEADLINE)
        handler.on_message(conn, b"2")
        work.job.result(DEADLINE)

    handler = muxcore.Threaded(recorder := Two(gate))
    with client(listen(handler)) as sock:
        sock.sendall(b"1")
        sock.shutdown(socket.SHUT_WR)
        until(mux, lambda: recorder.connections and recorder.connections[0].eof)
        gate.open.set()
        assert receive(mux, sock) == b"12sorry"
