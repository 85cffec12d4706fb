"""Any descriptor and signals: add_reader, add_writer, add_signal_handler."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import DEADLINE, InterruptAt, Recorder, client, turns, until

import muxcore

Listen = Callable[..., muxcore.Listener]
Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setblocking(False)
    yield ours, theirs
    ours.close()
    theirs.close()


# --- readers and writers ---------------------------------------------------------------------------


def test_a_reader_is_called_while_there_is_something_to_read(mux: muxcore.Mux, pair: Pair) -> None:
    """Level-triggered."""
    ours, theirs = pair
    got: list[bytes] = []
    mux.add_reader(ours, lambda size: got.append(ours.recv(size)), 1)
    assert turns(mux, 0.02) == 0
    theirs.sendall(b"abc")
    until(mux, lambda: len(got) == 3)
    assert got == [b"a", b"b", b"c"]
    assert turns(mux, 0.02) == 0


def test_a_writer_is_called_while_there_is_room(mux: muxcore.Mux, pair: Pair) -> None:
    ours, theirs = pair
    sent: list[int] = []
    mux.add_writer(ours, lambda: sent.append(ours.send(bytes(65536))))
    until(mux, lambda: sent and turns(mux, 0.02) == 0)
    received = len(theirs.recv(16 << 20))
    count = len(sent)
    until(mux, lambda: len(sent) > count)
    assert received <= sum(sent[:count])


def test_a_descriptor_has_both_directions_in_one_registration(mux: muxcore.Mux, pair: Pair) -> None:
    ours, theirs = pair
    calls: list[str] = []
    mux.add_reader(ours, lambda: (calls.append("read"), ours.recv(10)))
    mux.add_writer(ours, calls.append, "write")
    mux.poll(1)
    assert calls == ["write"], "there is nothing to read"
    calls.clear()
    theirs.sendall(b"x")
    mux.poll(1)
    assert calls == ["read", "write"]
    assert mux.stats().events == 2
    assert mux.remove_writer(ours)
    theirs.sendall(b"x")
    until(mux, lambda: calls == ["read", "write", "read"])


def test_adding_again_replaces(mux: muxcore.Mux, pair: Pair) -> None:
    ours, theirs = pair
    calls: list[int] = []
    mux.add_reader(ours, calls.append, 1)
    mux.add_reader(ours.fileno(), calls.append, 2)
    theirs.sendall(b"x")
    mux.poll(1)
    assert calls == [2]


def test_remove_returns_whether_there_was_a_watch(mux: muxcore.Mux, pair: Pair) -> None:
    ours, theirs = pair
    mux.add_reader(ours, print)
    assert not mux.remove_writer(ours)
    assert mux.remove_reader(ours)
    assert not mux.remove_reader(ours)
    theirs.sendall(b"x")
    assert turns(mux, 0.02) == 0


def test_removing_in_a_callback_drops_what_the_same_batch_has_for_it(mux: muxcore.Mux) -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    calls: list[int] = []

    def read(number: int) -> None:
        calls.append(number)
        for ours, _ in pairs:
            mux.remove_reader(ours)

    for number, (ours, theirs) in enumerate(pairs):
        mux.add_reader(ours, read, number)
        theirs.sendall(b"x")
    mux.poll(1)
    mux.poll(0)
    assert len(calls) == 1
    assert mux.stats().stale_events == 1
    for ours, theirs in pairs:
        ours.close()
        theirs.close()


def test_a_new_watch_gets_no_event_of_the_old_one(mux: muxcore.Mux, pair: Pair) -> None:
    """A callback removes another descriptor and closes it; a new one gets its number in the same batch."""
    calls: list[str] = []
    others = [socket.socketpair() for _ in range(2)]
    opened: list[Pair] = []

    def replace(me: int) -> None:
        calls.append("replaced")
        old = others[1 - me][0]
        mux.remove_reader(others[me][0])
        mux.remove_reader(old)
        number = old.fileno()
        old.close()
        opened.append(socket.socketpair())
        assert opened[0][0].fileno() == number
        mux.add_reader(number, calls.append, "stale")

    for me, (ours, theirs) in enumerate(others):
        mux.add_reader(ours, replace, me)
        theirs.sendall(b"x")
    mux.poll(1)
    mux.poll(0)
    assert calls == ["replaced"]
    for one, other in others + opened:
        one.close()
        other.close()


def test_a_full_descriptor_with_something_to_read_calls_its_reader_alone(mux: muxcore.Mux, pair: Pair) -> None:
    ours, theirs = pair
    calls: list[str] = []
    with pytest.raises(BlockingIOError):
        while True:
            ours.send(bytes(65536))
    mux.add_reader(ours, calls.append, "read")
    mux.add_writer(ours, calls.append, "write")
    theirs.sendall(b"x")
    mux.poll(1)
    assert calls == ["read"]


def test_a_writer_beside_a_reader_is_a_change_and_no_loss(
    mux: muxcore.Mux, pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    ours, _ = pair
    mux.add_reader(ours, print)
    mux.add_writer(ours, int)
    mux.poll(0)
    mux.poll(0)
    assert caplog.records == []


@pytest.mark.unix_only("EBADF")
def test_a_writer_that_could_not_be_added_is_not_there(mux: muxcore.Mux, pair: Pair) -> None:
    ours, _ = pair
    number = ours.fileno()
    mux.add_reader(number, print)
    ours.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        mux.add_writer(number, print)
    assert not mux.remove_writer(number)
    mux.remove_reader(number)


def test_a_removed_direction_is_not_called_in_the_same_event(mux: muxcore.Mux, pair: Pair) -> None:
    ours, theirs = pair
    calls: list[str] = []
    mux.add_reader(ours, lambda: (calls.append("read"), mux.remove_reader(ours), mux.remove_writer(ours)))
    mux.add_writer(ours, calls.append, "write")
    theirs.sendall(b"x")
    mux.poll(1)
    assert calls == ["read"]


def test_a_callback_that_raises_is_logged_and_stays(
    mux: muxcore.Mux, pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    ours, theirs = pair
    mux.add_reader(ours, int, "x")
    theirs.sendall(b"x")
    mux.poll(1)
    mux.poll(1)
    assert caplog.text.count("invalid literal") == 2
    assert mux.stats().handler_errors == 2


def test_an_interrupt_in_a_callback_leaves_the_watch(mux: muxcore.Mux, pair: Pair) -> None:
    ours, theirs = pair
    calls: list[int] = []

    def read() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        ours.recv(10)

    mux.add_reader(ours, read)
    theirs.sendall(b"x")
    with pytest.raises(KeyboardInterrupt):
        mux.poll(1)
    until(mux, lambda: len(calls) == 2)


@pytest.mark.parametrize("file", ["_mux.py", "_fallback/slots.py", "_fallback/pollers.py"])
def test_an_interrupt_while_watches_change_leaves_nothing_that_calls_nothing(
    mux: muxcore.Mux, pair: Pair, file: str
) -> None:
    """What the kernel reports and calls nothing would be reported for ever, and no wait would be one."""
    ours, _ = pair
    calls: list[int] = []
    steps: list[Callable[[], object]] = [
        lambda: mux.add_reader(ours, calls.append, 1),
        lambda: mux.add_writer(ours, calls.append, 2),
        lambda: mux.remove_writer(ours),
        lambda: mux.remove_reader(ours),
    ]
    for number, step in enumerate(steps):
        at, interrupted = 1, True
        while interrupted:
            mux.remove_reader(ours)
            mux.remove_writer(ours)
            for earlier in steps[:number]:
                earlier()
            interrupt = InterruptAt(file, at)
            interrupt.during(step)
            interrupted = interrupt.left <= 0
            mux.poll(0)
            del calls[:]
            events = mux.stats().events
            mux.poll(0)
            assert mux.stats().events - events == len(calls)
            at += 1


def test_closing_the_mux_in_a_callback_ends_the_event(backend: str, pair: Pair) -> None:
    ours, theirs = pair
    calls: list[int] = []
    mux = muxcore.Mux(backend=backend)
    mux.add_reader(ours, mux.close)
    mux.add_writer(ours, calls.append, 1)
    theirs.sendall(b"x")
    mux.poll(1)
    assert (mux.closed, calls) == (True, [])
    assert ours.recv(1) == b"x", "it is the user's, and open"


@pytest.mark.unix_only("pipes")
def test_the_end_of_a_pipe_is_reported_to_either_side(mux: muxcore.Mux) -> None:
    read_end, write_end = os.pipe()
    full_read, full_write = os.pipe()
    os.set_blocking(full_write, False)
    while True:
        try:
            os.write(full_write, bytes(65536))
        except BlockingIOError:
            break
    ended: list[str] = []
    mux.add_reader(read_end, lambda: (ended.append("reader"), mux.remove_reader(read_end)))
    mux.add_writer(full_write, lambda: (ended.append("writer"), mux.remove_writer(full_write)))
    assert turns(mux, 0.02) == 0
    os.close(write_end)
    os.close(full_read)
    until(mux, lambda: len(ended) == 2)
    os.close(read_end)
    os.close(full_write)


@pytest.mark.linux_only("timerfd")
def test_a_timerfd_is_watched(mux: muxcore.Mux) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_CLOEXEC)
    libc.timerfd_settime(fd, 0, struct.pack("4l", 0, 0, 0, 10_000_000), None)
    got: list[bytes] = []
    mux.add_reader(fd, lambda: got.append(os.read(fd, 8)))
    until(mux, lambda: got)
    assert struct.unpack("Q", got[0]) == (1,)
    mux.remove_reader(fd)
    os.close(fd)


@pytest.mark.linux_only("inotify")
def test_inotify_is_watched(mux: muxcore.Mux, tmp_path: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_CLOEXEC)
    create = 0x100
    assert libc.inotify_add_watch(fd, os.fsencode(tmp_path), create) >= 0
    got: list[bytes] = []
    mux.add_reader(fd, lambda: got.append(os.read(fd, 4096)))
    (tmp_path / "created").touch()
    until(mux, lambda: got)
    assert b"created" in got[0]
    mux.remove_reader(fd)
    os.close(fd)


@pytest.mark.linux_only("epoll")
def test_one_mux_drives_another(mux: muxcore.Mux) -> None:
    inner = muxcore.Mux(backend="epoll") if "epoll" in muxcore._impl.BACKENDS else pytest.skip("no compiled core")
    with inner:
        called: list[str] = []
        mux.add_reader(inner, inner.poll, 0)
        inner.call_soon(called.append, "inner")
        until(mux, lambda: called)
        mux.remove_reader(inner)


@pytest.mark.unix_only("files and sockets are numbered together")
def test_a_regular_file_is_refused_as_epoll_does(mux: muxcore.Mux, tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        for add in (mux.add_reader, mux.add_writer):
            with pytest.raises(PermissionError):
                add(file, print)
        assert not mux.remove_reader(file)
        assert turns(mux, 0.02) == 0


@pytest.mark.unix_only("a directory has a descriptor")
def test_a_directory_is_refused_as_epoll_does(mux: muxcore.Mux, tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(PermissionError):
        mux.add_reader(fd, print)
    os.close(fd)


@pytest.mark.unix_only("the lowest free descriptor is the next one")
def test_what_was_refused_is_forgotten(mux: muxcore.Mux, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its number may be a connection's next."""
    with (tmp_path / "file").open("w") as file:
        number = file.fileno()
        with pytest.raises(PermissionError):
            mux.add_reader(file, print)
    ours, theirs = socket.socketpair()
    assert ours.fileno() == number
    mux.attach(ours, Recorder())
    mux.poll(0)
    assert not caplog.records
    theirs.close()


class Numbered:
    """Its fileno() returns this number."""

    def __init__(self, number: Any) -> None:
        self.number = number

    def fileno(self) -> Any:
        return self.number


@pytest.mark.parametrize(
    ("fd", "fn", "error", "match"),
    [
        (-1, print, ValueError, "fd"),
        (1 << 40, print, ValueError, "fd"),
        ("0", print, TypeError, "fd"),
        (1.5, print, TypeError, "fd"),
        (Numbered(1.0), print, TypeError, r"fileno\(\) that returns an int, not float"),
        (Numbered("0"), print, TypeError, r"fileno\(\) that returns an int, not str"),
        (0, 5, TypeError, "fn"),
    ],
)
def test_bad_arguments_are_named(mux: muxcore.Mux, fd: Any, fn: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        mux.add_reader(fd, fn)


@pytest.mark.unix_only("EBADF")
def test_a_descriptor_that_is_not_open_is_refused(mux: muxcore.Mux) -> None:
    number = os.dup(0)
    os.close(number)
    with pytest.raises(OSError, match="Bad file descriptor"):
        mux.add_reader(number, print)
    assert not mux.remove_reader(number)


def test_the_descriptor_of_a_connection_is_refused(mux: muxcore.Mux, listen: Listen) -> None:
    recorder = Recorder(reply=lambda message: message)
    listener = listen(recorder)
    with client(listener):
        until(mux, lambda: recorder.connections)
        for owner in (listener, recorder.connections[0]):
            with pytest.raises(ValueError, match="belongs to <muxcore"):
                mux.add_reader(owner, print)
            assert not mux.remove_reader(owner)
            assert owner.fileno() >= 0


@pytest.mark.unix_only("EBADF")
def test_a_descriptor_closed_behind_our_back_does_not_spin(
    mux: muxcore.Mux, pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    """epoll forgets it by itself; select and poll report it, once."""
    ours, _ = pair
    calls: list[int] = []
    mux.add_reader(ours, calls.append, 1)
    number = ours.fileno()
    ours.close()
    assert turns(mux, 0.05) <= 1
    assert calls == []
    assert caplog.text.count("closed by other code") == (mux.backend != "epoll")
    assert mux.remove_reader(number) == (mux.backend == "epoll")


@pytest.mark.linux_only("numbers are reused at once")
def test_a_number_that_came_back_may_be_added_again(mux: muxcore.Mux) -> None:
    """Its old file was closed without remove_reader(): the kernel has removed it, and it must be registered anew."""
    old = socket.socketpair()
    number = old[0].fileno()
    mux.add_reader(old[0], print)
    old[0].close()
    new = socket.socketpair()
    assert new[0].fileno() == number
    got: list[bytes] = []
    mux.add_reader(new[0], lambda: got.append(new[0].recv(10)))
    new[1].sendall(b"x")
    until(mux, lambda: got)
    mux.remove_reader(new[0])
    for sock in (old[1], *new):
        sock.close()


@pytest.mark.linux_only("numbers are reused at once")
def test_a_connection_may_reuse_the_number_of_a_forgotten_watch(
    mux: muxcore.Mux, caplog: pytest.LogCaptureFixture
) -> None:
    forgotten = socket.socketpair()
    number = forgotten[0].fileno()
    mux.add_reader(forgotten[0], print, "never")
    forgotten[0].close()
    ours, theirs = socket.socketpair()
    assert ours.fileno() == number
    recorder = Recorder(reply=lambda message: message)
    mux.attach(ours, recorder)
    theirs.sendall(b"x")
    until(mux, lambda: recorder.count("message"))
    assert "watch on descriptor" in caplog.text
    theirs.close()
    forgotten[1].close()


@pytest.mark.linux_only("numbers are reused at once")
def test_a_watch_that_lost_its_number_in_a_callback_is_not_called_for_it(mux: muxcore.Mux) -> None:
    old = socket.socketpair()
    new: list[socket.socket] = []
    written: list[int] = []
    recorder = Recorder()
    number = old[0].fileno()

    def reads() -> None:
        if not new:
            old[0].close()
            new.extend(socket.socketpair())
            assert new[0].fileno() == number
            mux.attach(new[0], recorder)

    mux.add_writer(old[0], written.append, 1)
    turns(mux, 0)
    written.clear()
    mux.add_reader(old[0], reads)
    old[1].sendall(b"x")
    mux.poll(1)
    assert written == []
    old[1].close()
    new[1].close()


def test_select_names_its_limit(pair: Pair) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard <= 1100:
        pytest.skip("the limit of descriptors is too low")
    fcntl = pytest.importorskip("fcntl")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1100), hard))
    fd = fcntl.fcntl(pair[0], fcntl.F_DUPFD_CLOEXEC, 1050)
    try:
        with muxcore.Mux(backend="select") as mux, pytest.raises(ValueError, match="FD_SETSIZE"):
            mux.add_reader(fd, print)
    finally:
        os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_another_thread_is_refused(mux: muxcore.Mux, pair: Pair) -> None:
    mux.poll(0)
    errors: list[str] = []

    def try_all() -> None:
        for method in (mux.add_reader, mux.add_writer):
            try:
                method(pair[0], print)
            except RuntimeError as error:
                errors.append(str(error))

    thread = threading.Thread(target=try_all)
    thread.start()
    thread.join()
    assert len(errors) == 2


# --- signals ---------------------------------------------------------------------------------------

unix_signals = pytest.mark.unix_only("it sends itself a signal")


@unix_signals
@pytest.mark.parametrize("method", ["run", "poll"])
def test_a_signal_handler_is_called_from_the_loop(mux: muxcore.Mux, method: str) -> None:
    called: list[Any] = []

    def handle(argument: str) -> None:
        called.append(argument)
        with pytest.raises(RuntimeError, match="inside a callback"):
            mux.poll(0)
        mux.stop()

    mux.add_signal_handler(signal.SIGUSR1, handle, "argument")
    thread = threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGUSR1))
    thread.start()
    if method == "run":
        mux.run()
    else:
        while not called:
            mux.poll()
    thread.join()
    assert called == ["argument"]


@unix_signals
def test_a_signal_just_before_the_wait_ends_it(mux: muxcore.Mux) -> None:
    """Another thread gets it, so it interrupts no system call of this one: the wakeup socket has to end the wait."""
    called: list[int] = []
    mux.add_signal_handler(signal.SIGUSR1, called.append, 1)

    def kill() -> None:
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)

    thread = threading.Timer(0.02, kill)
    thread.start()
    start = time.monotonic()
    while not called:
        mux.poll(DEADLINE)
    assert time.monotonic() - start < DEADLINE
    thread.join()


@unix_signals
def test_a_signal_whose_handler_was_removed_and_added_again_ends_a_wait(
    mux: muxcore.Mux, caplog: pytest.LogCaptureFixture
) -> None:
    called: list[int] = []
    mux.add_signal_handler(signal.SIGUSR1, called.append, 1)
    mux.remove_signal_handler(signal.SIGUSR1)
    mux.poll(0)
    assert not caplog.records, "its sockets are closed, and were not watched any more"
    mux.add_signal_handler(signal.SIGUSR1, called.append, 2)
    thread = threading.Timer(0.02, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGUSR1))
    thread.start()
    start = time.monotonic()
    while not called:
        mux.poll(DEADLINE)
    assert time.monotonic() - start < DEADLINE
    assert called == [2]
    thread.join()


@unix_signals
def test_the_former_handler_comes_back(mux: muxcore.Mux) -> None:
    def mine(number: int, frame: object) -> None: ...

    before = signal.signal(signal.SIGUSR1, mine)
    try:
        mux.add_signal_handler(signal.SIGUSR1, print)
        mux.add_signal_handler(signal.SIGUSR1, print, "replaced")
        assert mux.remove_signal_handler(signal.SIGUSR1)
        assert signal.getsignal(signal.SIGUSR1) is mine
        assert not mux.remove_signal_handler(signal.SIGUSR1)
        mux.add_signal_handler(signal.SIGUSR1, print)
        mux.close()
        assert signal.getsignal(signal.SIGUSR1) is mine
    finally:
        signal.signal(signal.SIGUSR1, before)


@unix_signals
def test_the_wakeup_descriptor_outlives_run_and_goes_with_the_last_handler(mux: muxcore.Mux) -> None:
    def wakeup_fd() -> int:
        fd = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
        return fd

    assert wakeup_fd() == -1
    mux.call_soon(mux.add_signal_handler, signal.SIGUSR1, print)
    mux.call_soon(mux.stop)
    mux.run()
    assert wakeup_fd() != -1
    mux.remove_signal_handler(signal.SIGUSR1)
    assert wakeup_fd() == -1


@unix_signals
def test_two_muxes_restore_the_wakeup_descriptor_in_any_order(backend: str) -> None:
    first, second = (muxcore.Mux(backend=backend) for _ in range(2))
    first.add_signal_handler(signal.SIGUSR1, print)
    second.add_signal_handler(signal.SIGUSR2, print)
    first.close()
    second.close()
    assert signal.set_wakeup_fd(-1) == -1


@unix_signals
def test_the_wakeup_descriptor_of_another_loop_is_left_alone(mux: muxcore.Mux, pair: Pair) -> None:
    signal.set_wakeup_fd(pair[0].fileno())
    try:
        called: list[int] = []
        mux.add_signal_handler(signal.SIGUSR1, called.append, 1)
        os.kill(os.getpid(), signal.SIGUSR1)
        until(mux, lambda: called)
        mux.remove_signal_handler(signal.SIGUSR1)
        assert pair[1].recv(10) == bytes([signal.SIGUSR1])
    finally:
        assert signal.set_wakeup_fd(-1) == pair[0].fileno()


@unix_signals
def test_control_c_becomes_a_callback_and_then_an_interrupt_again(mux: muxcore.Mux) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored: by a shell's &
    called: list[int] = []
    mux.add_signal_handler(signal.SIGINT, called.append, 1)
    os.kill(os.getpid(), signal.SIGINT)
    until(mux, lambda: called)
    mux.remove_signal_handler(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        mux.poll(1)
    signal.signal(signal.SIGINT, before)


@pytest.mark.unix_only("it sends itself a signal")
def test_a_signal_while_the_mux_closes_is_dropped(backend: str) -> None:
    raised: list[BaseException] = []

    class Late(muxcore.Handler):
        def on_close(self, conn: muxcore.Connection, exc: BaseException | None) -> None:
            try:
                signal.raise_signal(signal.SIGUSR1)
            except RuntimeError as error:
                raised.append(error)

    ours, theirs = socket.socketpair()
    with theirs, muxcore.Mux(backend=backend) as mux:
        mux.add_signal_handler(signal.SIGUSR1, mux.stop)
        mux.attach(ours, Late())
    assert raised == []


@unix_signals
def test_an_interrupt_from_a_signal_handler_leaves_the_mux_usable(mux: muxcore.Mux, listen: Listen) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    mux.add_signal_handler(signal.SIGUSR1, interrupt)
    mux.call_later(0.01, os.kill, os.getpid(), signal.SIGUSR1)
    with pytest.raises(KeyboardInterrupt):
        mux.run()
    recorder = Recorder()
    with client(listen(recorder)):
        until(mux, lambda: recorder.count("open"))


@pytest.mark.parametrize(
    ("sig", "fn", "error", "match"),
    [
        (9999, print, ValueError, "sig"),
        ("SIGINT", print, TypeError, "sig"),
        (signal.SIGINT, 5, TypeError, "fn"),
        pytest.param(getattr(signal, "SIGKILL", 9), print, ValueError, "sig", marks=unix_signals),
    ],
)
def test_bad_signals_are_named(mux: muxcore.Mux, sig: Any, fn: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        mux.add_signal_handler(sig, fn)
    assert signal.set_wakeup_fd(-1) == -1


def test_signals_are_refused_outside_the_main_thread(backend: str) -> None:
    errors: list[str] = []

    def try_it() -> None:
        with muxcore.Mux(backend=backend) as mux:
            for call in (lambda: mux.add_signal_handler(signal.SIGINT, print),
                         lambda: mux.remove_signal_handler(signal.SIGINT)):
                try:
                    call()
                except RuntimeError as error:
                    errors.append(str(error))

    thread = threading.Thread(target=try_it)
    thread.start()
    thread.join()
    assert len(errors) == 2
    assert "main thread" in errors[0]


@unix_signals
def test_a_signal_handler_binds_the_mux_to_the_main_thread(mux: muxcore.Mux) -> None:
    mux.add_signal_handler(signal.SIGUSR1, print)
    errors: list[str] = []

    def poll() -> None:
        try:
            mux.poll(0)
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=poll)
    thread.start()
    thread.join()
    assert "belongs to the thread" in errors[0]


@unix_signals
def test_a_mux_that_is_about_to_close_refuses_signal_handlers(backend: str) -> None:
    before = signal.getsignal(signal.SIGUSR2)
    refused: list[str] = []
    mux = muxcore.Mux(backend=backend)

    def closes() -> None:
        mux.close()
        try:
            mux.add_signal_handler(signal.SIGUSR2, print)
        except RuntimeError as error:
            refused.append(str(error))
        assert signal.getsignal(signal.SIGUSR2) is before

    mux.add_signal_handler(signal.SIGUSR1, print)
    mux.call_soon(closes)
    mux.poll(0)
    assert (mux.closed, refused) == (True, ["the Mux is closed"])
    assert mux.stats().handler_errors == 0


@unix_signals
def test_a_child_forked_in_run_leaves_the_parents_set_alone() -> None:
    source = """
        import muxcore, os, signal, sys
        with muxcore.Mux() as mux:
            called = []
            mux.add_signal_handler(signal.SIGUSR1, called.append, 1)
            def fork():
                child = os.fork()
                if child:
                    os.waitpid(child, 0)
                    mux.stop()
            mux.call_soon(fork)
            parent = os.getpid()
            try:
                mux.run()
            finally:
                if os.getpid() != parent:
                    os._exit(0)
            os.kill(parent, signal.SIGUSR1)
            while not called: mux.poll(1)
        print("ok")
    """
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=40, check=False)
    assert (done.stdout, done.returncode) == ("ok\n", 0), done.stderr


class Number(int):
    def __hash__(self) -> int:
        return 7

    def __eq__(self, other: object) -> bool:
        return False


def test_a_descriptor_may_be_of_a_class_derived_from_int(mux: muxcore.Mux) -> None:
    """Whose hash and comparison are its own."""
    ours, theirs = socket.socketpair()
    theirs.send(b"x")
    received: list[bytes] = []
    mux.add_reader(Number(ours.fileno()), lambda: received.append(ours.recv(9)))
    until(mux, lambda: received)
    assert mux.remove_reader(ours.fileno())
    ours.close()
    theirs.close()
