"""muxcore.Epoll: what it has beyond select.epoll; test_stdlib.py has the rest."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support import alarms

import muxcore

pytestmark = pytest.mark.linux_only("epoll")


@pytest.fixture
def ep() -> Iterator[muxcore.Epoll]:
    with muxcore.Epoll() as ep:
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
        with pytest.raises(OSError, match="Invalid argument"):  # the kernel lets nobody modify such a registration
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


def test_fromfd(ep: muxcore.Epoll, pair: tuple[socket.socket, socket.socket]) -> None:
    with muxcore.Epoll.fromfd(os.dup(ep.fileno())) as other:
        other.register(pair[0], select.EPOLLOUT)
        assert ep.poll(1) == [(pair[0].fileno(), select.EPOLLOUT)]


@pytest.mark.parametrize(
    ("timeout", "error"), [("soon", TypeError), (float("nan"), ValueError), (1e30, OverflowError), ([], TypeError)]
)
def test_a_bad_timeout_is_refused(ep: muxcore.Epoll, timeout: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        ep.poll(timeout)
