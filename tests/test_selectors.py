"""muxcore.Selector: its modes, and its users; test_stdlib.py has the rest."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from selectors import EVENT_READ, EVENT_WRITE
from types import FrameType
from typing import Any

import pytest
from support import alarms

import muxcore
from muxcore._impl import BACKENDS


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


def compiled_selector() -> muxcore.Selector:
    if "epoll" not in BACKENDS:
        pytest.skip("modes are of the compiled core only")
    return muxcore.Selector(backend="epoll")


def test_reports_keys_and_events(selector: muxcore.Selector, pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    key = selector.register(ours, EVENT_READ | EVENT_WRITE, "data")
    assert selector.select(1) == [(key, EVENT_WRITE)]
    theirs.send(b"x")
    assert selector.select(1) == [(key, EVENT_READ | EVENT_WRITE)]
    theirs.close()
    key = selector.modify(ours, EVENT_READ, "other")
    assert selector.select(1) == [(key, EVENT_READ)]


def test_what_is_not_writable_is_not_called_so(
    selector: muxcore.Selector, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = pair
    ours.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            ours.send(bytes(1 << 16))
    selector.register(ours, EVENT_READ | EVENT_WRITE)
    theirs.sendall(b"x")
    assert [events for _, events in selector.select(1)] == [EVENT_READ]


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


@pytest.mark.linux_only("epoll")
@pytest.mark.parametrize("mode", ["edge", "oneshot", "exclusive"])
def test_the_mode_is_that_of_the_last_modify(pair: tuple[socket.socket, socket.socket], mode: Any) -> None:
    with compiled_selector() as selector:
        ours, theirs = pair
        theirs.send(b"x")

        def reports() -> list[int]:
            return [len(selector.select(0)) for _ in range(3)]

        often = [1, 1, 1] if mode == "exclusive" else [1, 0, 0]
        selector.register(ours, EVENT_READ, mode=mode)
        assert reports() == often
        selector.modify(ours, EVENT_READ, mode=mode)
        assert reports() == often
        selector.modify(ours, EVENT_READ, "other data", mode="level")
        assert reports() == [1, 1, 1]
        selector.modify(ours, EVENT_READ, mode=mode)
        assert reports() == often
        selector.modify(ours, EVENT_READ | EVENT_WRITE)
        assert reports() == [1, 1, 1]


@pytest.mark.linux_only("epoll")
@pytest.mark.parametrize("mode", ["edge", "oneshot", "exclusive"])
def test_the_mode_that_is_not_given_is_level_whatever_it_was(
    pair: tuple[socket.socket, socket.socket], mode: Any
) -> None:
    """Registered with another one, or modified to another one."""
    ours, theirs = pair
    theirs.send(b"x")
    for modified in (False, True):
        with compiled_selector() as selector:
            selector.register(ours, EVENT_READ, mode="level" if modified else mode)
            if modified:
                selector.modify(ours, EVENT_READ, mode=mode)
            selector.select(0)
            selector.modify(ours, EVENT_READ)
            assert [len(selector.select(0)) for _ in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("events", [0, 4, EVENT_READ | 8])
def test_events_that_there_are_not_are_refused(
    selector: muxcore.Selector, pair: tuple[socket.socket, socket.socket], events: int
) -> None:
    ours, theirs = pair
    with pytest.raises(ValueError, match="Invalid events"):
        selector.register(ours, events)
    assert len(selector.get_map()) == 0
    key = selector.register(ours, EVENT_READ)
    with pytest.raises(ValueError, match="Invalid events"):
        selector.modify(ours, events)
    theirs.send(b"x")
    assert selector.select(0) == [(key, EVENT_READ)]


def test_other_events_with_the_same_data_are_those_of_the_key(
    selector: muxcore.Selector, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, _ = pair
    selector.register(ours, EVENT_READ, "data")
    key = selector.modify(ours, EVENT_WRITE, "data")
    assert (key.events, key.data) == (EVENT_WRITE, "data")
    assert selector.select(1) == [(key, EVENT_WRITE)]


def test_new_data_alone_is_not_the_systems_business(
    selector: muxcore.Selector, pair: tuple[socket.socket, socket.socket]
) -> None:
    """As in selectors: so it may be set though the file was closed."""
    ours, _ = pair
    selector.register(ours, EVENT_READ, "old")
    ours.close()
    assert selector.modify(ours, EVENT_READ, "new").data == "new"
    assert selector.unregister(ours).data == "new"


def test_input_does_not_wake_a_wait_for_writing(
    selector: muxcore.Selector, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = pair
    ours.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            ours.send(bytes(1 << 16))
    theirs.sendall(b"x")
    selector.register(ours, EVENT_WRITE)
    start = time.monotonic()
    assert selector.select(0.05) == []
    assert time.monotonic() - start >= 0.05


@pytest.mark.unix_only("a descriptor may be duplicated")
def test_what_was_closed_and_unregistered_but_lives_elsewhere_is_not_reported(
    selector: muxcore.Selector, pair: tuple[socket.socket, socket.socket]
) -> None:
    """epoll goes on reporting it."""
    ours, theirs = pair
    same = os.dup(ours.fileno())
    selector.register(ours, EVENT_READ)
    ours.close()
    selector.unregister(ours)
    theirs.sendall(b"x")
    assert selector.select(0) == []
    os.close(same)


@pytest.mark.unix_only("0 is a descriptor as others are")
def test_descriptor_0_may_be_registered(
    selector: muxcore.Selector, pair: tuple[socket.socket, socket.socket]
) -> None:
    before = os.dup(0)
    os.dup2(pair[0].fileno(), 0)
    try:
        key = selector.register(0, EVENT_WRITE)
        assert selector.select(1) == [(key, EVENT_WRITE)]
        selector.unregister(0)
    finally:
        os.dup2(before, 0)
        os.close(before)


def test_it_has_a_descriptor_where_it_is_an_epoll_set(
    selector: muxcore.Selector, pair: tuple[socket.socket, socket.socket]
) -> None:
    assert hasattr(selector, "fileno") == (selector.backend == "epoll")
    if selector.backend == "epoll":
        selector.register(pair[0], EVENT_WRITE)
        assert select.select([selector], [], [], 1)[0] == [selector]


def test_the_data_of_a_closed_selector_is_let_go(
    selector: muxcore.Selector, pair: tuple[socket.socket, socket.socket]
) -> None:
    class Data: ...

    data = Data()
    gone = weakref.ref(data)
    selector.register(pair[0], EVENT_READ, data)
    del data
    selector.close()
    assert gone() is None


def test_what_is_refused_changes_nothing(
    selector: muxcore.Selector, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = pair
    bad: Any = "bad"
    with pytest.raises(ValueError, match="mode must be one of"):
        selector.register(ours, EVENT_READ, mode=bad)
    key = selector.register(ours, EVENT_READ)
    with pytest.raises(ValueError, match="mode must be one of"):
        selector.modify(ours, EVENT_WRITE, mode=bad)
    theirs.send(b"x")
    assert selector.select(0) == [(key, EVENT_READ)]


def test_what_could_not_be_modified_is_not_watched(
    selector: muxcore.Selector, pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C came behind the system call: a descriptor in the kernel's set without a key would be a spin."""
    ours, theirs = pair
    watcher: Any = selector._watcher
    modify = watcher.modify

    def interrupted(*args: Any) -> None:
        modify(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(watcher, "modify", interrupted)
    selector.register(ours, EVENT_READ)
    with pytest.raises(KeyboardInterrupt):
        selector.modify(ours, EVENT_READ | EVENT_WRITE)
    assert len(selector.get_map()) == 0
    theirs.send(b"x")
    start = time.monotonic()
    assert selector.select(0.05) == []
    assert time.monotonic() - start >= 0.05


def test_it_may_change_while_its_map_is_looked_through(
    selector: muxcore.Selector, pair: tuple[socket.socket, socket.socket]
) -> None:
    for sock in pair:
        selector.register(sock, EVENT_READ)
    for fd in selector.get_map():
        selector.unregister(fd)  # type: ignore[arg-type]
    assert len(selector.get_map()) == 0


def test_a_signal_handler_may_register_while_a_closed_file_is_looked_for(
    selector: muxcore.Selector, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = pair
    other = socket.socket()
    selector.register(other, EVENT_READ)
    selector.register(ours, EVENT_READ)
    ours.close()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_name == "_fd" and "key" in frame.f_locals and theirs not in selector.get_map():
            selector.register(theirs, EVENT_WRITE)  # as a signal handler would, between two lines
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        selector.unregister(ours)
    finally:
        sys.settrace(before)
    other.close()
    assert theirs in selector.get_map()


@pytest.mark.parametrize("name", ["poll", "select"])
def test_a_file_that_was_closed_is_reported_where_the_kernel_does(
    name: str, pair: tuple[socket.socket, socket.socket]
) -> None:
    """A read then raises the reason. Else `select` would return nothing at once, for ever."""
    ours, _ = pair
    with muxcore.Selector(backend=name) as selector:
        key = selector.register(ours, EVENT_READ)
        ours.close()
        assert selector.select(1) == [(key, EVENT_READ)]


def test_finalisers_of_data_may_do_anything(
    selector: muxcore.Selector, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, _ = pair

    class Data:
        def __del__(self) -> None:
            selector.register(ours, EVENT_WRITE, "again")

    selector.register(ours, EVENT_READ, Data())
    selector.unregister(ours)
    assert [(key.data, events) for key, events in selector.select(1)] == [("again", EVENT_WRITE)]


@pytest.mark.unix_only("SIGALRM")
def test_a_signal_handler_that_closes_it_during_a_select(
    selector: muxcore.Selector, pair: tuple[socket.socket, socket.socket]
) -> None:
    selector.register(pair[0], EVENT_READ)
    with alarms(selector.close):
        assert selector.select(0.1) == []
    assert selector.get_map() is None


def test_files_are_for_the_poll_backend(tmp_path: Path, backend: str) -> None:
    with muxcore.Selector(backend=backend) as selector, (tmp_path / "file").open("w+") as file:
        if backend == "epoll":
            with pytest.raises(PermissionError):
                selector.register(file, EVENT_WRITE)
            assert len(selector.get_map()) == 0
        elif backend == "poll":
            key = selector.register(file, EVENT_WRITE)
            assert selector.select(1) == [(key, EVENT_WRITE)]


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
        reply = await reader.readexactly(5)
        writer.close()
        await writer.wait_closed()
        await echoed.wait()
        server.close()
        await server.wait_closed()
        return reply

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
