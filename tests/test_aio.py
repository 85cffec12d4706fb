"""A Mux in another library's loop: its descriptor reports everything (Promise driven-from-outside), and asyncio or trio
drives it by that."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import os
import select
import signal
import socket
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from support import DEADLINE, LOCALHOST, Recorder, pattern

import muxcore
import muxcore.aio
from muxcore._impl import BACKENDS

driven = pytest.mark.skipif("epoll" not in BACKENDS, reason="only the compiled core has a descriptor")


# --- the descriptor --------------------------------------------------------------------------------


@pytest.fixture
def inner() -> Iterator[muxcore.Mux]:
    if "epoll" not in BACKENDS:
        pytest.skip("only the compiled core has a descriptor")
    with muxcore.Mux(backend="epoll") as mux:
        yield mux


def drive(mux: muxcore.Mux, condition: Callable[[], object]) -> int:
    """What another loop does: poll(0) whenever the descriptor is readable; how often it was."""
    count = 0
    while not condition():
        assert select.select([mux.fileno()], [], [], DEADLINE)[0], "the descriptor never became readable"
        mux.poll(0)
        count += 1
    return count


def is_readable(mux: muxcore.Mux) -> bool:
    return bool(select.select([mux.fileno()], [], [], 0)[0])


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_descriptor_is_readable_when_a_timer_is_due(inner: muxcore.Mux, when: str) -> None:
    """Set before or after fileno() was called the first time."""
    called: list[float] = []
    if when == "after":
        inner.fileno()
    due = time.monotonic() + 0.03
    inner.call_at(due, lambda: called.append(time.monotonic()))
    assert drive(inner, lambda: called) <= 3
    assert due <= called[0] < due + 5


def test_an_earlier_timer_and_one_that_a_timer_sets_wake_the_driver(inner: muxcore.Mux) -> None:
    called: list[str] = []
    inner.fileno()
    inner.call_later(1000, called.append, "never")
    inner.call_later(0.02, lambda: (called.append("first"), inner.call_later(0.01, called.append, "second")))
    assert drive(inner, lambda: len(called) == 2) <= 6
    assert called == ["first", "second"]


def test_timers_of_equal_time_are_all_called(inner: muxcore.Mux) -> None:
    """The second is set by the first, for a time that has come: it waits for the next turn, which has to come."""
    called: list[int] = []
    when = time.monotonic() + 0.01
    inner.fileno()
    inner.call_at(when, lambda: inner.call_at(when, called.append, 1))
    drive(inner, lambda: called)


def test_a_cancelled_timer_does_not_spin(inner: muxcore.Mux) -> None:
    inner.fileno()
    inner.call_later(0.01, print).cancel()
    count, end = 0, time.monotonic() + 0.05
    while (left := end - time.monotonic()) > 0:
        count += bool(select.select([inner.fileno()], [], [], left)[0])
        inner.poll(0)
    assert count <= 2
    assert not is_readable(inner)


def test_a_timeout_of_a_connection_wakes_the_driver(inner: muxcore.Mux) -> None:
    recorder = Recorder()
    listener = inner.listen(LOCALHOST, recorder, timeouts=muxcore.Timeouts(idle=0.05, linger=0))
    with muxcore.Mux(backend="select") as other:
        other.attach(socket.create_connection(listener.address), Recorder())
        drive(inner, lambda: recorder.count("close"))
    assert isinstance(recorder.reason(), muxcore.IdleTimeout)


def test_what_was_queued_before_wakes_the_driver(inner: muxcore.Mux) -> None:
    called: list[int] = []
    inner.call_soon(called.append, 1)
    drive(inner, lambda: called)
    assert not is_readable(inner)


# --- asyncio ---------------------------------------------------------------------------------------


def uvloop_loop() -> asyncio.AbstractEventLoop:
    uvloop = pytest.importorskip("uvloop", reason="uvloop is not installed")
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


@pytest.fixture(scope="module", autouse=True)
def signal_pipe_of_libuv() -> None:
    """It is opened with the first loop and never closed; before anybody counts descriptors."""
    if importlib.util.find_spec("uvloop") is not None:
        uvloop_loop().close()


@pytest.fixture(params=[asyncio.new_event_loop, uvloop_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Iterator[Callable[[Awaitable[Any]], Any]]:
    """Run a coroutine in a loop of this kind."""
    with asyncio.Runner(loop_factory=request.param) as runner:
        runner.get_loop()  # a skip is to come now
        yield runner.run  # type: ignore[misc]


Run = Callable[[Awaitable[Any]], Any]


async def echoed(address: Any, data: bytes) -> bytes:
    """Send data from a coroutine, and read as much."""
    reader, writer = await asyncio.open_connection(*address)
    writer.write(data)
    writer.write_eof()
    got = await asyncio.wait_for(reader.read(-1), DEADLINE)
    writer.close()
    await writer.wait_closed()
    return got


def test_a_mux_serves_in_a_running_loop(inner: muxcore.Mux, run: Run) -> None:
    async def main() -> None:
        muxcore.aio.attach(inner, asyncio.get_running_loop())
        listener = inner.listen(LOCALHOST, lambda conn, message: conn.send(message))
        data = pattern(1 << 20)
        assert await asyncio.gather(*(echoed(listener.address, data) for _ in range(5))) == [data] * 5

    run(main())


def test_a_turn_of_the_mux_is_no_error_to_the_loop(inner: muxcore.Mux, run: Run) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        errors: list[Any] = []
        loop.set_exception_handler(lambda loop, context: errors.append(context))
        muxcore.aio.attach(inner, loop)
        listener = inner.listen(LOCALHOST, lambda conn, message: conn.send(message))
        assert await echoed(listener.address, b"x") == b"x"
        assert errors == []

    run(main())


def test_coroutines_serve_a_connection_of_the_mux(inner: muxcore.Mux, run: Run) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write((await reader.readexactly(5)).upper())
            writer.close()

        server = await asyncio.start_server(handle, *LOCALHOST)
        reply: asyncio.Future[bytes] = loop.create_future()
        muxcore.aio.attach(inner, loop)
        sock = socket.create_connection(server.sockets[0].getsockname())
        conn = inner.attach(sock, lambda conn, message: reply.set_result(message))
        conn.send(b"hello")
        assert await asyncio.wait_for(reply, DEADLINE) == b"HELLO"
        server.close()
        await server.wait_closed()

    run(main())


def test_timers_of_both_go_off_in_time(inner: muxcore.Mux, run: Run) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        muxcore.aio.attach(inner, loop)
        calls: asyncio.Queue[str] = asyncio.Queue()
        start = time.monotonic()
        inner.call_later(0.06, calls.put_nowait, "mux, late")
        inner.call_later(0.02, calls.put_nowait, "mux")
        loop.call_later(0.04, calls.put_nowait, "asyncio")
        names = [await asyncio.wait_for(calls.get(), DEADLINE) for _ in range(3)]
        assert time.monotonic() - start >= 0.06
        assert [name for name in names if name != "asyncio"] == ["mux", "mux, late"]

    run(main())


def test_calls_of_other_threads_arrive(inner: muxcore.Mux, run: Run) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        muxcore.aio.attach(inner, loop)
        done: asyncio.Future[int] = loop.create_future()
        thread = threading.Thread(target=inner.call_soon_threadsafe, args=(done.set_result, 5))
        thread.start()
        assert await asyncio.wait_for(done, DEADLINE) == 5
        future = inner.run_in_executor(None, pow, 2, 10)
        assert await asyncio.wait_for(asyncio.wrap_future(future), DEADLINE) == 1024
        thread.join()

    run(main())


@pytest.mark.unix_only("it sends itself a signal")
def test_signals_stay_the_loops(inner: muxcore.Mux, run: Run) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        muxcore.aio.attach(inner, loop)
        got: asyncio.Future[str] = loop.create_future()
        loop.add_signal_handler(signal.SIGUSR1, lambda: got.set_result("asyncio"))
        mine: asyncio.Future[str] = loop.create_future()
        inner.add_signal_handler(signal.SIGUSR2, mine.set_result, "mux")
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            os.kill(os.getpid(), number)
        assert await asyncio.wait_for(got, DEADLINE) == "asyncio"
        assert await asyncio.wait_for(mine, DEADLINE) == "mux"
        inner.remove_signal_handler(signal.SIGUSR2)
        loop.remove_signal_handler(signal.SIGUSR1)

    run(main())


def test_a_detached_mux_is_its_users_again(inner: muxcore.Mux, run: Run) -> None:
    called: list[int] = []

    async def main() -> None:
        attachment = muxcore.aio.attach(inner, asyncio.get_running_loop())
        attachment.detach()
        attachment.detach()
        inner.call_soon(called.append, 1)
        await asyncio.sleep(0.02)
        assert called == []

    run(main())
    inner.poll(0)
    assert called == [1]


def test_closing_the_mux_in_a_callback_removes_it_from_the_loop(inner: muxcore.Mux, run: Run) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        muxcore.aio.attach(inner, loop)
        fd = inner.fileno()
        inner.call_soon(inner.close)
        while not inner.closed:
            await asyncio.sleep(0)
        assert not loop.remove_reader(fd)

    run(main())


def test_the_loop_may_end_first(inner: muxcore.Mux, run: Run) -> None:
    async def main() -> None:
        muxcore.aio.attach(inner, asyncio.get_running_loop())

    run(main())


def test_an_exception_of_the_mux_goes_to_the_loop(inner: muxcore.Mux, run: Run) -> None:
    """A connection without a handler: only poll() could report what becomes of it."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        reported: asyncio.Future[str] = loop.create_future()
        loop.set_exception_handler(lambda loop, context: reported.set_result(str(context["exception"])))
        muxcore.aio.attach(inner, loop)
        listener = inner.listen(LOCALHOST)
        with socket.create_connection(listener.address):
            assert "without a handler" in await asyncio.wait_for(reported, DEADLINE)
        inner.close()

    run(main())


@driven
def test_what_asyncio_cannot_drive_is_refused(backend: str) -> None:
    loop = asyncio.new_event_loop()
    with muxcore.Mux(backend=backend) as mux:
        for arguments, error, match in (((5, loop), TypeError, "mux"), ((mux, 5), TypeError, "loop")):
            with pytest.raises(error, match=match):
                muxcore.aio.attach(*arguments)  # type: ignore[arg-type]
        if backend != "epoll":
            with pytest.raises(ValueError, match=f"the {backend} backend has no descriptor"):
                muxcore.aio.attach(mux, loop)
        mux.listen(LOCALHOST)
        with pytest.raises(RuntimeError, match="without"):
            muxcore.aio.attach(mux, loop)
    loop.close()


# --- trio ------------------------------------------------------------------------------------------


def test_trio_drives_a_mux_by_its_descriptor(inner: muxcore.Mux) -> None:
    trio = pytest.importorskip("trio", reason="trio is not installed")

    async def drive() -> None:
        while True:
            await trio.lowlevel.wait_readable(inner.fileno())
            inner.poll(0)

    async def main() -> None:
        listener = inner.listen(LOCALHOST, lambda conn, message: conn.send(message))
        data = pattern(1 << 20)
        got = b""
        with trio.fail_after(DEADLINE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(drive)
                async with await trio.open_tcp_stream(*listener.address) as stream:
                    nursery.start_soon(stream.send_all, data)
                    while len(got) < len(data):
                        got += await stream.receive_some(1 << 16)
                nursery.cancel_scope.cancel()
        assert got == data

    trio.run(main)


@driven
def test_a_mux_that_goes_from_loop_to_loop_keeps_none_of_them() -> None:
    gone = []
    with muxcore.Mux(backend="epoll") as mux:
        for _ in range(3):
            loop = asyncio.new_event_loop()
            attachment = muxcore.aio.attach(mux, loop)
            attachment.detach()
            loop.close()
            gone.append(weakref.ref(loop))
            del loop, attachment
        gc.collect()
        assert [loop() for loop in gone] == [None] * 3


@driven
@pytest.mark.parametrize("first_is_closed", [False, True])
def test_a_mux_that_is_attached_again_is_driven_by_its_latest_loop(first_is_closed: bool) -> None:
    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    with muxcore.Mux(backend="epoll") as mux:
        called: list[int] = []
        before = [muxcore.aio.attach(mux, first)]
        if first_is_closed:
            first.close()
        before.append(muxcore.aio.attach(mux, second))
        muxcore.aio.attach(mux, second)
        for attachment in before:
            attachment.detach()  # which is nothing any more
        mux.call_soon(called.append, 1)
        second.run_until_complete(asyncio.sleep(0.05))
        assert called == [1]
    first.close()
    second.close()


@driven
def test_a_loop_that_cannot_watch_leaves_the_mux_to_its_former_loop() -> None:
    first, closed = asyncio.new_event_loop(), asyncio.new_event_loop()
    closed.close()
    with muxcore.Mux(backend="epoll") as mux:
        called: list[int] = []
        muxcore.aio.attach(mux, first)
        with pytest.raises(RuntimeError, match="closed"):
            muxcore.aio.attach(mux, closed)
        mux.call_soon(called.append, 1)
        first.run_until_complete(asyncio.sleep(0.05))
        assert called == [1]
    first.close()


def test_a_mux_that_is_closed_has_left_the_loop(inner: muxcore.Mux) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        number = inner.fileno()
        muxcore.aio.attach(inner, loop)
        inner.close()
        assert not loop.remove_reader(number)

    asyncio.run(main())


@driven
def test_a_second_detach_removes_no_other_reader(inner: muxcore.Mux) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        attachment = muxcore.aio.attach(inner, loop)
        number = inner.fileno()
        attachment.detach()
        loop.add_reader(number, print)  # as another that has the number by now
        attachment.detach()
        assert loop.remove_reader(number)

    asyncio.run(main())
