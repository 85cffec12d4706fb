"""muxcore.Selector: its modes, and its users; test_stdlib.py has the rest."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from selectors import EVENT_READ, EVENT_WRITE

import pytest
from support import alarms

import muxcore


@pytest.fixture
def selector(backend: str) -> Iterator[muxcore.Selector]:
    with muxcore.Selector(backend=backend) as selector:
        yield selector


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


def test_reports_keys_and_events(selector: muxcore.Selector, pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    key = selector.register(ours, EVENT_READ | EVENT_WRITE, "data")
    assert selector.select(1) == [(key, EVENT_WRITE)]
    theirs.send(b"x")
    assert selector.select(1) == [(key, EVENT_READ | EVENT_WRITE)]
    theirs.close()
    key = selector.modify(ours, EVENT_READ, "other")
    assert selector.select(1) == [(key, EVENT_READ)]


def test_edge_and_oneshot(pair: tuple[socket.socket, socket.socket], backend: str) -> None:
    ours, theirs = pair
    with muxcore.Selector(backend=backend) as selector:
        if backend != "epoll":
            with pytest.raises(ValueError, match="mode must be one of"):
                selector.register(ours, EVENT_READ, mode="edge")
            return
        key = selector.register(ours, EVENT_READ, mode="edge")
        theirs.send(b"x")
        assert selector.select(1) == [(key, EVENT_READ)]
        assert selector.select(0) == []
        selector.modify(ours, EVENT_READ, mode="oneshot")
        assert selector.select(1) == [(key, EVENT_READ)]
        theirs.send(b"y")
        assert selector.select(0) == []


def test_a_timeout_is_never_early(selector: muxcore.Selector) -> None:
    start = time.monotonic()
    assert selector.select(0.0103) == []
    assert time.monotonic() - start >= 0.0103


@pytest.mark.unix_only("SIGALRM")
def test_a_signal_does_not_shorten_a_select(selector: muxcore.Selector) -> None:
    """The standard library's tests do not notice a wait that returns early on EINTR."""
    with alarms() as caught:
        start = time.monotonic()
        assert selector.select(0.15) == []
        assert time.monotonic() - start >= 0.15
        assert len(caught) >= 3


@pytest.mark.unix_only("elsewhere descriptors are not small numbers")
def test_select_beyond_fd_setsize_names_the_limit() -> None:
    import fcntl
    import resource

    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 1100:
        pytest.skip("the limit on open files is too low to get a descriptor above 1024")
    ours, theirs = socket.socketpair()
    high = fcntl.fcntl(ours.fileno(), fcntl.F_DUPFD, 1024)
    with (
        socket.socket(fileno=high) as sock,
        muxcore.Selector(backend="select") as selector,
        pytest.raises(ValueError, match="FD_SETSIZE, is 1024"),
    ):
        selector.register(sock, EVENT_READ)
    ours.close()
    theirs.close()


def test_asyncio_runs_on_it(selector: muxcore.Selector) -> None:
    async def main() -> bytes:
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"hello")
        answer = await reader.readexactly(5)
        writer.close()
        await writer.wait_closed()
        await echoed.wait()
        server.close()
        await server.wait_closed()
        return answer

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            writer.write(data)
        writer.close()
        await writer.wait_closed()
        echoed.set()

    echoed = asyncio.Event()
    loop = asyncio.SelectorEventLoop(selector)
    try:
        assert loop.run_until_complete(main()) == b"hello"
    finally:
        loop.close()
