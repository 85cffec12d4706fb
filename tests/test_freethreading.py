"""Threads that run at the same time: nothing lost, nothing torn, on builds with and without a GIL (Promise threads).

Where there is no GIL these tests show races; where there is one, a short switch interval makes the most of it.
MUXCORE_HAMMER=1000000 makes the long ones so many operations long (`make hammer`).
"""

from __future__ import annotations

import os
import random
import re
import select
import socket
import subprocess
import sys
import sysconfig
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import pytest
from support import DEADLINE, LOCALHOST, Recorder, exchange

import muxcore

OPERATIONS = int(os.environ.get("MUXCORE_HAMMER", "8000"))
THREADS = 4
LINES = 6  # connections at a time
PER_ROUND = 500  # operations of one thread on one set of connections
NO_LIMIT = muxcore.Limits(high=1 << 30, low=0, max_outbox=1 << 30)  # so that False means refused

needs_free_threading = pytest.mark.skipif(
    not sysconfig.get_config_var("Py_GIL_DISABLED"),
    reason="needs a free-threaded CPython >= 3.13: make free-threaded, with MUXCORE_FREETHREADED_PYTHON naming one, "
    "or pyenv install 3.13t",
)


@pytest.fixture(autouse=True)
def short_switch_interval() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def at_once(*calls: Callable[[], object]) -> None:
    """Make each call in a thread of its own, as much at the same time as possible; raises what one of them raises."""
    barrier = threading.Barrier(len(calls))
    failures: list[BaseException] = []

    def run(call: Callable[[], object]) -> None:
        barrier.wait(DEADLINE)
        try:
            call()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


class Running:
    """A Mux that runs in a thread of its own."""

    def __init__(self, backend: str) -> None:
        self.mux = muxcore.Mux(backend=backend)
        self.thread = threading.Thread(target=self.mux.run)

    def __enter__(self) -> Running:
        self.call(int)  # from here on there is always a loop
        self.thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if not self.mux.closed:
            self.mux.call_soon_threadsafe(self.mux.close)
        self.thread.join(DEADLINE)
        assert not self.thread.is_alive()

    def call(self, fn: Callable[..., Any], *args: Any) -> Any:
        """What fn(*args) returns in the Mux's thread."""
        if not self.thread.is_alive():
            return fn(*args)
        done: list[Any] = []
        ready = threading.Event()
        self.mux.call_soon_threadsafe(lambda: (done.append(fn(*args)), ready.set()))
        assert ready.wait(DEADLINE)
        return done[0]


# --- nothing is lost -------------------------------------------------------------------------------


class Line:
    """A connection that several threads send on, and one of them may end, and what its peer has to get."""

    def __init__(self, running: Running, recorder: Recorder) -> None:
        ours, self.peer = socket.socketpair()
        self.peer.settimeout(DEADLINE)
        self.conn = running.call(lambda: running.mux.attach(ours, recorder, limits=NO_LIMIT))
        self.accepted: list[list[int]] = [[] for _ in range(THREADS)]
        self.refused = [0] * THREADS
        self.aborted = False

    def send(self, thread: int, number: int) -> None:
        if self.conn.send(b"%d %d;" % (thread, number)):
            self.accepted[thread].append(number)
        else:
            self.refused[thread] += 1

    def received(self) -> list[list[int]]:
        got = bytearray()
        try:
            while data := self.peer.recv(1 << 16):
                got += data
        except ConnectionResetError:
            assert self.aborted
        self.peer.close()
        found: list[list[int]] = [[] for _ in range(THREADS)]
        for message in bytes(got).split(b";")[:-1]:
            thread, number = message.split()
            found[int(thread)].append(int(number))
        return found


def hammer(running: Running, recorder: Recorder, seed: int, aborts: bool) -> int:
    """One round: threads that send, call and close, all at once; how many messages were refused."""
    lines = [Line(running, recorder) for _ in range(LINES)]
    called: list[list[int]] = [[] for _ in range(THREADS)]
    calls = [0] * THREADS

    def work(thread: int) -> None:
        dice = random.Random(seed * THREADS + thread)
        for number in range(PER_ROUND):
            line, what = dice.choice(lines), dice.random()
            if what < 0.0005 and aborts:
                line.aborted = True
                line.conn.abort()
            elif what < 0.002:
                line.conn.close()
            elif what < 0.4:
                running.mux.call_soon_threadsafe(called[thread].append, calls[thread])
                calls[thread] += 1
            else:
                line.send(thread, number)
            assert line.conn.id > 0
            assert line.conn.peer == ""
        for line in lines:
            line.conn.close()

    received: list[list[list[int]]] = []
    at_once(*(partial(work, thread) for thread in range(THREADS)),
            lambda: received.extend(line.received() for line in lines))
    running.call(int)  # behind everything that they have queued
    assert called == [list(range(count)) for count in calls]
    for line, found in zip(lines, received, strict=True):
        if not line.aborted:
            assert found == line.accepted
            assert line.conn.outbox_size == 0
    return sum(sum(line.refused) for line in lines)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("aborts", [False, True], ids=["close", "abort"])
def test_what_threads_do_at_once_comes_in_order_and_nothing_is_lost(backend: str, aborts: bool) -> None:
    """Every accepted message arrives, in the order of its thread, whichever thread closes; every refused one is
    counted; every call is made; every connection ends once."""
    recorder = Recorder()
    rounds = max(OPERATIONS // (THREADS * PER_ROUND), 1)
    with Running(backend) as running:
        refused = sum(hammer(running, recorder, seed, aborts) for seed in range(rounds))
        drops = running.mux.stats().drops
    assert recorder.count("open") == recorder.count("close") == LINES * rounds
    assert len({number for name, number, _ in recorder.events if name == "close"}) == LINES * rounds
    if aborts:
        assert drops >= refused  # and what was accepted before an abort, and is lost with the connection
    else:
        assert drops == refused


@pytest.mark.timeout(3600)
def test_the_drops_of_many_threads_are_all_counted(backend: str) -> None:
    ours, peer = socket.socketpair()
    count = OPERATIONS // THREADS
    with Running(backend) as running, peer:
        conn = running.call(running.mux.attach, ours, print)
        running.call(conn.abort)
        at_once(*[lambda: [conn.send(b"x") for _ in range(count)]] * THREADS)
        assert running.mux.stats().drops == THREADS * count


@pytest.mark.timeout(3600)
def test_drops_of_datagrams_are_counted_beside_those_of_other_threads(backend: str) -> None:
    ours, peer = socket.socketpair()
    count = OPERATIONS // THREADS
    with Running(backend) as running, peer:
        conn = running.call(running.mux.attach, ours, print)
        datagram = running.call(running.mux.datagram, LOCALHOST, print)
        running.call(conn.abort)
        running.call(datagram.close)
        sender = partial(send_refused, conn.send, count)
        to_itself = partial(datagram.send, address=datagram.address)
        at_once(sender, sender, lambda: running.call(send_refused, to_itself, 2 * count))
        assert running.mux.stats().drops == 4 * count


def send_refused(send: Callable[[bytes], bool], count: int) -> None:
    for _ in range(count):
        assert not send(b"x")


@pytest.mark.timeout(3600)
def test_what_is_sent_while_a_connection_that_is_not_open_closes_arrives(backend: str) -> None:
    """Promise close-loses-nothing: close() loses nothing that was accepted, from whichever thread, and ends at once if
    that was nothing."""
    with Running(backend) as running, socket.create_server(LOCALHOST) as server:
        server.settimeout(DEADLINE)
        for number in range(max(OPERATIONS // 40, 1)):
            send_to_what_closes(running, server, b"%d;" % number)


def send_to_what_closes(running: Running, server: socket.socket, message: bytes) -> None:
    recorder = Recorder()
    address = server.getsockname()

    def connect() -> None:
        conn = running.mux.connect(address, recorder)
        connected.append(conn)
        conn.close()

    def send() -> None:
        while not connected:
            pass
        conn = connected[0]
        while conn.send(message):
            accepted.append(message)
            if len(accepted) == 100:
                return

    connected: list[muxcore.Connection] = []
    accepted: list[bytes] = []
    at_once(send, lambda: running.call(connect))
    got = b""
    while accepted and not got:  # the kernel may have made connections that were closed with nothing to send
        sock, _ = server.accept()
        with sock:
            got = read_to_the_end(sock)
    assert got == b"".join(accepted)


@pytest.mark.timeout(3600)
def test_what_is_sent_while_the_mux_closes_arrives_or_is_reported(backend: str) -> None:
    """Promise ending: close() flushes what was accepted; on_close reports what the kernel did not accept."""
    for _ in range(max(OPERATIONS // 400, 1)):
        send_while_closing(backend)


def send_while_closing(backend: str) -> None:
    recorder = Recorder()
    ours, peer = socket.socketpair()
    accepted = [0] * THREADS
    sending = threading.Barrier(THREADS + 1)

    def send(thread: int) -> None:
        sending.wait(DEADLINE)
        while conn.send(b"12345678"):
            accepted[thread] += 8

    def close() -> None:
        sending.wait(DEADLINE)
        running.mux.call_soon_threadsafe(running.mux.close)

    got: list[int] = []
    with peer, Running(backend) as running:
        conn = running.call(lambda: running.mux.attach(ours, recorder, limits=NO_LIMIT))
        at_once(close, *(partial(send, thread) for thread in range(THREADS)), lambda: got.append(count(peer)))
        running.thread.join(DEADLINE)
    reason = recorder.reason()
    unsent = int(re.findall(r"(\d+) bytes unsent", str(reason))[0]) if reason is not None else 0
    assert got[0] + unsent == sum(accepted)


def count(sock: socket.socket) -> int:
    """Bytes up to the end of the stream."""
    size = 0
    while data := sock.recv(1 << 16):
        size += len(data)
    return size


def test_what_is_sent_while_another_thread_starts_run_arrives(backend: str) -> None:
    """Before the first turn a send does its work in its own thread, and it may be in the middle of it."""
    for _ in range(max(OPERATIONS // 200, 1)):
        ours, peer = socket.socketpair()
        with peer, muxcore.Mux(backend=backend) as mux:
            conn = mux.attach(ours, print, limits=NO_LIMIT)
            sender = partial(send_numbers, conn, b"%d;", 50)
            thread = threading.Thread(target=mux.run)
            at_once(thread.start, sender, sender)
            conn.close()
            got = sorted(read_to_the_end(peer).split(b";")[:-1], key=int)
            assert got == [b"%d" % (number // 2) for number in range(100)]
            mux.call_soon_threadsafe(mux.close)
            thread.join(DEADLINE)
            assert not thread.is_alive()


def send_numbers(conn: muxcore.Connection, form: bytes, count: int) -> None:
    for number in range(count):
        assert conn.send(form % number)


def read_to_the_end(sock: socket.socket) -> bytes:
    got = bytearray()
    while data := sock.recv(1 << 16):
        got += data
    return bytes(got)


def test_of_two_threads_that_run_a_mux_one_does(backend: str) -> None:
    for _ in range(50):
        with muxcore.Mux(backend=backend) as mux:
            refused: list[str] = []

            def poll(mux: muxcore.Mux, refused: list[str], all_refused: threading.Event) -> None:
                try:
                    mux.poll(0)
                except RuntimeError as error:
                    refused.append(str(error))
                    if len(refused) == THREADS - 1:
                        all_refused.set()
                else:
                    assert all_refused.wait(DEADLINE)
                    mux.close()

            at_once(*[partial(poll, mux, refused, threading.Event())] * THREADS)
            assert len(refused) == THREADS - 1
            assert all("belongs to the thread" in text for text in refused)


# --- nothing is torn -------------------------------------------------------------------------------


def test_a_framer_may_change_while_other_threads_send(backend: str) -> None:
    """What they send is encoded by the old one or by the new one."""
    ours, peer = socket.socketpair()
    framers = [muxcore.Lines(), muxcore.Delimiter(b"!"), OwnFramer, muxcore.LengthPrefix(1)]
    with peer, Running(backend) as running:
        conn = running.call(lambda: running.mux.attach(ours, print, limits=NO_LIMIT, framer=framers[0]))
        sending = True

        def change() -> None:
            nonlocal sending
            try:
                for number in range(OPERATIONS // 100):
                    running.call(setattr, conn, "framer", framers[number % len(framers)])
                    running.call(setattr, conn, "limits", muxcore.Limits(high=1 << 30, low=number, max_outbox=1 << 30))
            finally:
                sending = False
                conn.close()

        sent: list[int] = []
        got: list[bytes] = []

        def send() -> None:
            count = 0
            while sending:
                if conn.outbox_size > 1 << 16:
                    time.sleep(0.001)
                    continue
                count += conn.send(b"message")
                assert conn.framer in framers
                assert conn.limits.max_outbox == 1 << 30
                assert conn.timeouts.linger
                assert conn.listener is None
            sent.append(count)

        at_once(change, send, send, lambda: got.append(read_to_the_end(peer)))
    assert re.fullmatch(rb"(message\n|message!|<message>|\x07message)*", got[0])
    assert got[0].count(b"message") == sum(sent)


class OwnFramer:
    def feed(self, data: bytes) -> list[bytes]:
        return []

    def encode(self, message: bytes) -> bytes:
        return b"<" + message + b">"

    def rest(self) -> bytes:
        return b""


def test_data_may_change_while_other_threads_read_it(backend: str) -> None:
    ours, peer = socket.socketpair()
    with peer, Running(backend) as running:
        conn = running.call(running.mux.attach, ours, print)
        conn.data = [0]

        def change() -> None:
            for number in range(OPERATIONS):
                conn.data = [number]

        def read() -> None:
            for _ in range(OPERATIONS):
                assert len(conn.data) == 1

        at_once(change, change, read, read)


def test_the_peer_is_the_same_for_threads_that_read_it_at_once(backend: str) -> None:
    """Its tuple is made when it is first read."""
    recorder = Recorder()
    with Running(backend) as running:
        listener = running.call(running.mux.listen, LOCALHOST, recorder)
        for number in range(20):
            with socket.create_connection(listener.address) as sock:
                while len(recorder.connections) <= number:
                    running.call(int)
                conn, peers = recorder.connections[number], []
                at_once(*[lambda: peers.append(conn.peer)] * THREADS)  # noqa: B023
                assert peers == [sock.getsockname()] * THREADS


def test_the_peer_may_be_read_while_it_connects(backend: str) -> None:
    """It is the address as it was given first, then that of getpeername."""
    with Running(backend) as running, socket.create_server(LOCALHOST) as server:
        host, port = server.getsockname()
        for _ in range(max(OPERATIONS // 400, 1)):
            recorder = Recorder()
            conn = running.call(lambda: running.mux.connect((str(host), int(port)), recorder))  # noqa: B023

            def look() -> None:
                while recorder.count("open") == 0:  # noqa: B023
                    assert conn.peer == (host, port)  # noqa: B023

            at_once(look, look)
            running.call(conn.abort)
            server.accept()[0].close()


def test_threads_may_set_up_a_mux_at_once_before_its_first_turn(backend: str) -> None:
    """listen, attach and add_reader: each descriptor has its owner, each connection its number, and all are counted."""
    each = 25
    for _ in range(max(OPERATIONS // 1000, 1)):
        with muxcore.Mux(backend=backend) as mux:
            pairs = [[socket.socketpair() for _ in range(each)] for _ in range(THREADS)]
            watched = [[socket.socketpair() for _ in range(each)] for _ in range(THREADS)]

            def set_up(thread: int) -> None:
                for (ours, _), (reader, _) in zip(pairs[thread], watched[thread], strict=True):  # noqa: B023
                    conns.append(mux.attach(ours, print, timeouts=muxcore.Timeouts(idle=60)))  # noqa: B023
                    mux.add_reader(reader, int)
                    listeners.append(mux.listen(LOCALHOST, print))  # noqa: B023

            conns: list[muxcore.Connection] = []
            listeners: list[muxcore.Listener] = []
            at_once(*(partial(set_up, thread) for thread in range(THREADS)))
            assert len({conn.id for conn in conns}) == THREADS * each
            assert set(mux.connections) == set(conns)
            assert mux.stats().connections == mux.stats().peak_connections == THREADS * each
            assert len({listener.address for listener in listeners}) == THREADS * each
            assert all(mux.remove_reader(reader) for row in watched for reader, _ in row)
            mux.poll(0)
        for sock, peer in chain.from_iterable(pairs + watched):
            sock.close()
            peer.close()


@pytest.mark.linux_only("it needs eventfd")
def test_a_wakeup_never_goes_to_the_next_owner_of_a_descriptor(backend: str) -> None:
    """stop() writes to a descriptor of the Mux, which may be closing it, and its number may be in use again."""
    stopping = True
    for _ in range(max(OPERATIONS // 40, 1)):
        mux = muxcore.Mux(backend=backend)
        stopping = True

        def stop(mux: muxcore.Mux) -> None:
            while stopping:  # noqa: B023
                mux.stop()

        def close(mux: muxcore.Mux) -> None:
            nonlocal stopping
            mux.run()
            mux.run()
            mux.close()
            fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(4)]
            stopping = False
            try:
                assert select.select(fds, (), (), 0)[0] == []
            finally:
                for fd in fds:
                    os.close(fd)

        at_once(partial(stop, mux), partial(close, mux))


@pytest.mark.linux_only("select.epoll is Linux")
def test_of_two_threads_that_close_an_epoll_one_does() -> None:
    """The other would close the file that has got the number since."""
    for _ in range(max(OPERATIONS // 40, 1)):
        epoll = muxcore.Epoll()
        ends: list[tuple[int, int]] = []
        at_once(epoll.close, epoll.close, epoll.close, lambda: ends.append(os.pipe()))  # noqa: B023
        for fd in ends[0]:
            os.close(fd)  # OSError if it was closed


def test_several_muxes_serve_in_threads_at_once(backend: str) -> None:
    def serve() -> None:
        with muxcore.Mux(backend=backend) as mux:
            listener = mux.listen(LOCALHOST, lambda conn, message: conn.send(message), framer=muxcore.Lines())
            with socket.create_connection(listener.address) as sock:
                for number in range(OPERATIONS // 100):
                    line = b"%d" % number * 50 + b"\n"
                    assert exchange(mux, sock, line) == line

    at_once(*[serve] * THREADS)


# --- the interpreter -------------------------------------------------------------------------------


@needs_free_threading
def test_the_import_leaves_the_gil_off() -> None:
    source = """
        import sys, muxcore, muxcore.aio, muxcore.selectors
        from muxcore._impl import core
        print(core, sys._is_gil_enabled())
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHON_GIL"}
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, env=environment)
    assert done.stderr == ""
    assert done.stdout == "compiled False\n"
