"""muxcore.Epoll: what it has beyond select.epoll; test_stdlib.py has the rest."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import select
import signal
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from support import DEADLINE, alarms, leave_errno

import muxcore
from muxcore._fallback import pollers

pytestmark = pytest.mark.linux_only("epoll")


@pytest.fixture(params=sorted({muxcore.Epoll, pollers.Epoll}, key=repr), ids=lambda kind: kind.__module__)
def kind(request: pytest.FixtureRequest) -> Any:
    """The Epoll of each core."""
    return request.param


@pytest.fixture
def ep(kind: Any) -> Iterator[muxcore.Epoll]:
    with kind() as ep:
        yield ep


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


def test_data_comes_back_in_the_place_of_the_descriptor(
    ep: muxcore.Epoll, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = pair
    thing = object()
    ep.register(ours, select.EPOLLIN, data=thing)
    theirs.send(b"x")
    assert ep.poll(1) == [(thing, select.EPOLLIN)]
    ep.modify(ours, select.EPOLLIN, data="other")
    assert ep.poll(1) == [("other", select.EPOLLIN)]
    ep.unregister(ours)
    ep.register(ours, select.EPOLLIN)
    assert ep.poll(1) == [(ours.fileno(), select.EPOLLIN)]


def test_exclusive_is_there(ep: muxcore.Epoll) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ep.register(server, select.EPOLLIN | select.EPOLLEXCLUSIVE)
        with pytest.raises(OSError, match="Invalid argument"):  # the kernel refuses to modify such a registration
            ep.modify(server, select.EPOLLIN)


@pytest.mark.parametrize("timeout", [0.0003, 0.02])
def test_a_timeout_is_never_early(ep: muxcore.Epoll, timeout: float) -> None:
    start = time.monotonic()
    assert ep.poll(timeout) == []
    assert time.monotonic() - start >= timeout


def test_a_signal_does_not_shorten_a_wait(ep: muxcore.Epoll) -> None:
    with alarms() as caught:
        start = time.monotonic()
        assert ep.poll(0.15) == []
        assert time.monotonic() - start >= 0.15
        assert len(caught) >= 3


def test_more_events_than_the_stack_holds(ep: muxcore.Epoll) -> None:
    pairs = [socket.socketpair() for _ in range(300)]
    for ours, theirs in pairs:
        ep.register(ours, select.EPOLLIN)
        theirs.send(b"x")
    assert len(ep.poll(1)) == 300
    assert len(ep.poll(1, 7)) == 7
    for ours, theirs in pairs:
        ours.close()
        theirs.close()


def test_other_threads_run_during_a_wait(ep: muxcore.Epoll, pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    ep.register(ours, select.EPOLLIN)
    thread = threading.Thread(target=theirs.send, args=(b"x",))
    thread.start()
    assert ep.poll() == [(ours.fileno(), select.EPOLLIN)]
    thread.join()


def test_closed(ep: muxcore.Epoll) -> None:
    ep.close()
    ep.close()
    assert ep.closed
    for call in (ep.fileno, lambda: ep.poll(0), lambda: ep.register(0)):
        with pytest.raises(ValueError, match="closed epoll object"):
            call()


def test_fromfd(kind: Any, ep: muxcore.Epoll, pair: tuple[socket.socket, socket.socket]) -> None:
    with kind.fromfd(os.dup(ep.fileno())) as other:
        other.register(pair[0], select.EPOLLOUT)
        assert ep.poll(1) == [(pair[0].fileno(), select.EPOLLOUT)]


@pytest.mark.parametrize(
    ("timeout", "error"), [("soon", TypeError), (float("nan"), ValueError), (1e30, OverflowError), ([], TypeError)]
)
def test_a_bad_timeout_is_refused(ep: muxcore.Epoll, timeout: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        ep.poll(timeout)


class Index:
    def __init__(self, number: int) -> None:
        self.number = number

    def __index__(self) -> int:
        return self.number


class Closes:
    """A number of the user's, whose making closes the set."""

    def __init__(self, ep: muxcore.Epoll) -> None:
        self.ep = ep

    def __index__(self) -> int:
        self.ep.close()
        return 0

    fileno = __index__

    def __float__(self) -> float:
        return float(self.__index__())


# What is done to a set in which descriptor r is registered and w is not.
CALLS = {
    "a mask of all bits": lambda ep, r, w: ep.register(w, -1),
    "a mask of a complement": lambda ep, r, w: ep.modify(r, ~select.EPOLLOUT),
    "a mask beyond 32 bits": lambda ep, r, w: ep.modify(r, 2**32 + 1),
    "a mask beyond 64 bits": lambda ep, r, w: ep.modify(r, 2**64 + 1),
    "a mask that is a bool": lambda ep, r, w: ep.modify(r, True),
    "a mask that is an index": lambda ep, r, w: ep.modify(r, Index(4)),
    "a mask that is a float": lambda ep, r, w: ep.modify(r, 1.0),
    "a mask that is None": lambda ep, r, w: ep.modify(r, None),
    "a timeout that is text": lambda ep, r, w: ep.poll("1"),
    "an infinite timeout": lambda ep, r, w: ep.poll(float("inf")),
    "a timeout of minus infinity": lambda ep, r, w: ep.poll(float("-inf")),
    "a timeout that is NaN": lambda ep, r, w: ep.poll(float("nan")),
    "a timeout of ages": lambda ep, r, w: ep.poll(1e30),
    "a timeout that is a bool": lambda ep, r, w: ep.poll(False),
    "a timeout that is an index": lambda ep, r, w: ep.poll(Index(0)),
    "no event at most": lambda ep, r, w: ep.poll(0, 0),
    "minus two events at most": lambda ep, r, w: ep.poll(0, -2),
    "a float of events at most": lambda ep, r, w: ep.poll(0, 1.0),
    "one event at most, as a bool": lambda ep, r, w: ep.poll(0, True),
    "None of events at most": lambda ep, r, w: ep.poll(0, None),
    "keywords": lambda ep, r, w: ep.poll(timeout=0, maxevents=5),
    "a descriptor that is a float": lambda ep, r, w: ep.register(1.5),
    "a negative descriptor": lambda ep, r, w: ep.register(-1),
    "a descriptor beyond 31 bits": lambda ep, r, w: ep.register(2**31),
    "a descriptor that is text": lambda ep, r, w: ep.register("a"),
    "a descriptor that is not open": lambda ep, r, w: ep.register(2**20),
    "unregister what is unknown": lambda ep, r, w: ep.unregister(w),
    "modify what is unknown": lambda ep, r, w: ep.modify(w, 1),
    "register again": lambda ep, r, w: ep.register(r),
    "register with keywords": lambda ep, r, w: ep.register(fd=w, eventmask=4),
    "fromfd of text": lambda ep, r, w: type(ep).fromfd("a"),
    "fromfd of a float": lambda ep, r, w: type(ep).fromfd(1.0),
    "fromfd of -1": lambda ep, r, w: type(ep).fromfd(-1).closed,
    "fromfd of -2": lambda ep, r, w: type(ep).fromfd(-2).closed,
    "a hint of 0": lambda ep, r, w: type(ep)(0),
    "a hint of -1": lambda ep, r, w: type(ep)(-1).closed,
    "a hint of -2": lambda ep, r, w: type(ep)(-2),
    "a hint that is a float": lambda ep, r, w: type(ep)(1.0),
    "unknown flags": lambda ep, r, w: type(ep)(1, 5),
    "flags": lambda ep, r, w: type(ep)(flags=select.EPOLL_CLOEXEC).closed,
    "a hash": lambda ep, r, w: isinstance(hash(ep), int),
    "a truth": lambda ep, r, w: bool(ep),
    "closed is set": lambda ep, r, w: setattr(ep, "closed", True),
    "leave": lambda ep, r, w: (ep.__exit__(None, None, None), ep.closed),
    "poll when closed": lambda ep, r, w: (ep.close(), ep.poll(0)),
    "fileno when closed": lambda ep, r, w: (ep.close(), ep.fileno()),
    "enter when closed": lambda ep, r, w: (ep.close(), ep.__enter__()),
    "unregister when closed": lambda ep, r, w: (ep.close(), ep.unregister(r)),
    "register when closed": lambda ep, r, w: (ep.close(), ep.register(w)),
}


def outcome(kind: Any, call: Any, fds: list[int]) -> tuple[Any, Any]:
    """What a call returns or raises, and what is ready afterwards."""
    with kind() as ep:
        ep.register(fds[0], select.EPOLLIN)
        try:
            result = call(ep, *fds)
        except Exception as error:
            result = type(error)
        return result, None if ep.closed else ep.poll(0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a mask that is cut to 32 bits: CPython 3.15's alone
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_it_does_with_odd_arguments_what_select_epoll_does(kind: Any, call: Any) -> None:
    fds = list(os.pipe())
    try:
        os.write(fds[1], b"x")
        assert outcome(kind, call, fds) == outcome(pollers.system_epoll, call, fds)
    finally:
        for fd in fds:
            os.close(fd)


@pytest.mark.parametrize(
    "call",
    [
        lambda ep, fd, closes: ep.register(closes),
        lambda ep, fd, closes: ep.register(fd, closes),
        lambda ep, fd, closes: ep.modify(fd, closes),
        lambda ep, fd, closes: ep.unregister(closes),
        lambda ep, fd, closes: ep.poll(closes),
        lambda ep, fd, closes: ep.poll(0, closes),
    ],
    ids=["a descriptor", "a mask", "another mask", "what is unregistered", "a timeout", "a number of events"],
)
def test_an_argument_that_closes_the_set_finds_it_closed(
    ep: muxcore.Epoll, pair: tuple[socket.socket, socket.socket], call: Any
) -> None:
    with suppress(ValueError):
        assert call(ep, pair[0].fileno(), Closes(ep)) == []
    assert ep.closed


def test_a_signal_handler_that_closes_it_ends_the_wait(
    ep: muxcore.Epoll, pair: tuple[socket.socket, socket.socket]
) -> None:
    """Another file has its number by then, and is not looked at."""
    fd = ep.fileno()
    with ExitStack() as stack:

        def close() -> None:
            if not ep.closed:
                ep.close()
                other = stack.enter_context(muxcore.Epoll())
                assert other.fileno() == fd
                other.register(pair[0], select.EPOLLOUT)

        with alarms(close):
            assert ep.poll() == []


def test_a_signal_handler_that_closes_it_ends_a_wait_that_its_successor_would_not_end(ep: muxcore.Epoll) -> None:
    """Another epoll set has its number by then, and nothing is ready there."""
    others: list[muxcore.Epoll] = []

    def close(number: int, frame: object) -> None:
        ep.close()
        others.append(muxcore.Epoll())

    before = signal.signal(signal.SIGALRM, close)
    try:
        start = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        assert ep.poll(5) == []
        assert time.monotonic() - start < 4
    finally:
        signal.signal(signal.SIGALRM, before)
        others[0].close()


@pytest.mark.parametrize("timeout", [None, -1, -1e-10])
def test_a_wait_without_end_ends_with_an_event_alone(
    ep: muxcore.Epoll, kind: Any, pair: tuple[socket.socket, socket.socket], timeout: float | None
) -> None:
    if timeout == -1e-10 and kind is pollers.Epoll:
        pytest.skip("select.epoll makes 0 of it")
    ours, theirs = pair
    ep.register(ours, select.EPOLLIN)
    count = 0

    def send() -> None:
        nonlocal count
        count += 1
        if count == 3:
            theirs.send(b"x")

    with alarms(send):
        assert ep.poll(timeout) == [(ours.fileno(), select.EPOLLIN)]
        assert count >= 3


def test_another_thread_may_close_it_during_a_wait(
    ep: muxcore.Epoll, pair: tuple[socket.socket, socket.socket]
) -> None:
    """Its data is gone by then, and bare descriptors are not what the caller can use."""
    ours, theirs = pair
    ep.register(ours, select.EPOLLIN, data="data")
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(ep.poll()))
    thread.start()
    stat = Path(f"/proc/self/task/{thread.native_id}/stat")
    while stat.read_text().rpartition(")")[2].split()[0] != "S":
        pass  # it does not wait yet
    ep.close()
    theirs.send(b"x")
    thread.join(DEADLINE)
    assert found == [[]]


def test_finalisers_of_data_may_do_anything(ep: muxcore.Epoll, pair: tuple[socket.socket, socket.socket]) -> None:
    """The one of what was unregistered registers the same descriptor again."""
    ours, _ = pair

    class Data:
        def __del__(self) -> None:
            ep.register(ours, select.EPOLLOUT, data="again")

    ep.register(ours, select.EPOLLIN, data=Data())
    ep.unregister(ours)
    assert ep.poll(1) == [("again", select.EPOLLOUT)]


def test_the_data_of_a_closed_set_is_let_go(ep: muxcore.Epoll, pair: tuple[socket.socket, socket.socket]) -> None:
    class Data: ...

    data = Data()
    gone = weakref.ref(data)
    ep.register(pair[0], select.EPOLLIN, data=data)
    del data
    ep.close()
    assert gone() is None


def test_fileno_of_an_object_is_looked_up_once(ep: muxcore.Epoll, pair: tuple[socket.socket, socket.socket]) -> None:
    numbers = [pair[0].fileno(), pair[1].fileno()]

    class Fickle:
        def fileno(self) -> int:
            return numbers.pop(0)

    ep.register(Fickle(), select.EPOLLOUT, data="mine")
    assert ep.poll(1) == [("mine", select.EPOLLOUT)]


def test_a_number_that_is_no_descriptor_is_refused(kind: Any) -> None:
    with pytest.raises(OSError, match="invalid descriptor"):
        kind.fromfd(-5)


def test_the_data_of_a_descriptor_that_was_closed_is_not_that_of_the_next_with_its_number(ep: muxcore.Epoll) -> None:
    one, two = socket.socketpair()
    ep.register(one, select.EPOLLOUT, data="old")
    number = one.fileno()
    one.close()
    three, four = socket.socketpair()
    assert three.fileno() == number
    ep.register(three, select.EPOLLOUT)
    assert ep.poll(1) == [(number, select.EPOLLOUT)]
    for sock in (two, three, four):
        sock.close()


def test_the_memory_of_a_large_batch_is_freed(ep: muxcore.Epoll) -> None:
    def pages() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0])

    ep.poll(0, 1_000_000)
    before = pages()
    for _ in range(20):
        ep.poll(0, 1_000_000)
    assert (pages() - before) * 4096 < 100_000_000


def test_a_set_that_is_forgotten_closes_its_descriptor(kind: Any) -> None:
    ep = kind()
    number = ep.fileno()
    del ep
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_close_reports_a_descriptor_that_other_code_has_closed(kind: Any) -> None:
    """As select.epoll does since CPython 3.15 (gh-146205)."""
    ep = kind()
    os.close(ep.fileno())
    with pytest.raises(OSError, match="Bad file descriptor"):
        ep.close()
    assert ep.closed
    ep.close()


@pytest.mark.skipif(muxcore.Epoll is pollers.Epoll, reason="select.epoll waits for whole milliseconds")
def test_a_wait_may_be_shorter_than_a_millisecond() -> None:
    release = tuple(int("".join(filter(str.isdigit, part))) for part in os.uname().release.split(".")[:2])
    if release < (5, 11) or not hasattr(ctypes.CDLL(None), "epoll_pwait2"):
        pytest.skip("this system has no epoll_pwait2")
    with muxcore.Epoll() as ep:
        waits = []
        for _ in range(50):
            start = time.monotonic()
            assert ep.poll(0.0002) == []
            waits.append(time.monotonic() - start)
    assert 0.0002 <= min(waits) < 0.001


# --- against mutants that survived (tests/mutants) -----------------------------------------------------


@pytest.mark.parametrize("timeout", [0, 0.001])
def test_a_set_that_other_code_has_closed_is_an_error(kind: Any, timeout: float) -> None:
    ep = kind()
    number = ep.fileno()
    os.close(number)
    with pytest.raises(OSError, match="Bad file descriptor"):
        ep.poll(timeout)
    with pytest.raises(OSError, match="Bad file descriptor"):
        ep.close()
    assert ep.closed


@pytest.mark.skipif(
    muxcore.Epoll is pollers.Epoll or not hasattr(ctypes.CDLL(None), "epoll_pwait2"),
    reason="it needs the compiled core, and epoll_pwait2",
)
def test_a_timeout_is_not_rounded_to_milliseconds() -> None:
    def waited() -> float:
        start = time.monotonic()
        ep.poll(0.0001)
        return time.monotonic() - start

    with muxcore.Epoll() as ep:
        assert min(waited() for _ in range(100)) < 0.001


def test_what_an_earlier_call_has_left_in_errno_is_no_error(ep: muxcore.Epoll) -> None:
    for timeout in (0, 0.001):
        leave_errno(errno.ENOENT)
        assert ep.poll(timeout) == []
