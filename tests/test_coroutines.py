"""Connections for coroutines, in asyncio's own loop and in uvloop's (Promise coroutines)."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support import LOCALHOST, pattern
from test_aio import signal_pipe_of_libuv, uvloop_loop

import muxcore
from muxcore import Lines, aio
from muxcore._coroutines import running_mux
from muxcore._impl import BACKENDS
from muxcore.aio import EndOfStream, Stream

pytestmark = pytest.mark.skipif("epoll" not in BACKENDS, reason="only the compiled core has a descriptor for a loop")
Run = Callable[[Awaitable[Any]], Any]
__all__ = ["signal_pipe_of_libuv"]  # a fixture of this module, too


@pytest.fixture(params=[asyncio.new_event_loop, uvloop_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Run a coroutine in a loop of this kind, whose Mux is closed with it."""
    muxes = []

    async def and_look(awaitable: Awaitable[Any]) -> Any:
        muxes.append(await running_mux(aio.attach))
        async with asyncio.timeout(30):
            return await awaitable

    with asyncio.Runner(loop_factory=request.param) as runner:
        runner.get_loop()
        yield lambda awaitable: runner.run(and_look(awaitable))
    assert all(mux.closed for mux in muxes)


async def echo(stream: Stream) -> None:
    async for message in stream:
        await stream.send(message)


async def pair(handle: Any = None, framer: Any = None, **options: Any) -> tuple[Stream, Stream, aio.Server]:
    """The client's stream and the server's."""
    theirs: asyncio.Future[Stream] = asyncio.get_running_loop().create_future()

    async def serve(stream: Stream) -> None:
        theirs.set_result(stream)
        await (handle(stream) if handle is not None else asyncio.get_running_loop().create_future())

    server = await aio.serve(serve, LOCALHOST, framer=framer, **options)
    stream = await aio.connect(server.listener.address, framer=framer)
    return stream, await theirs, server


@pytest.mark.parametrize(
    ("framer", "message"),
    [(Lines(), b"line"), (muxcore.LengthPrefix(4), bytes(100_000)), (muxcore.Resp(), [b"GET", b"key"]),
     (muxcore.Fixed(4), b"four"), (muxcore.Delimiter(b"--"), b"part")],
)  # fmt: skip
def test_messages_of_each_framer_pass(run: Run, framer: Any, message: Any) -> None:
    async def main() -> None:
        stream, _, _ = await pair(echo, framer)
        await stream.send(message)
        assert await stream.receive() == message

    run(main())


def test_a_stream_ends_behind_its_last_message(run: Run) -> None:
    async def main() -> None:
        stream, theirs, _ = await pair(framer=Lines())
        await theirs.send_many([b"one", b"two"])
        await theirs.send_eof()
        assert [message async for message in stream] == [b"one", b"two"]
        with pytest.raises(EndOfStream):
            await stream.receive()
        await stream.send(b"half open")
        assert await theirs.receive() == b"half open"

    run(main())


def test_what_came_before_a_reset_is_received_before_its_reason(run: Run) -> None:
    async def main() -> None:
        stream, theirs, _ = await pair(framer=Lines())
        await theirs.send(b"one")
        theirs.connection.flush()
        while not stream._messages:
            await asyncio.sleep(0)
        theirs.connection.abort()
        assert await stream.receive() == b"one"
        with pytest.raises(ConnectionResetError) as caught:
            await stream.receive()
        with pytest.raises(ConnectionResetError):
            await stream.send(b"x")
        assert stream.reason is caught.value

    run(main())


def test_a_timeout_of_the_connection_is_its_reason(run: Run) -> None:
    async def main() -> None:
        _, theirs, _ = await pair(framer=Lines(), timeouts=muxcore.Timeouts(idle=0.05))
        with pytest.raises(muxcore.IdleTimeout):
            await theirs.receive()

    run(main())


def test_malformed_input_is_its_reason(run: Run) -> None:
    async def main() -> None:
        stream, theirs, _ = await pair(framer=Lines(max_size=10))
        stream.connection.write(b"good\n" + b"x" * 20)
        assert await theirs.receive() == b"good"
        with pytest.raises(muxcore.FrameTooLarge):
            await theirs.receive()

    run(main())


def test_a_cancelled_receive_loses_no_message(run: Run) -> None:
    async def main() -> None:
        stream, theirs, _ = await pair(framer=Lines())
        numbers = [b"%d" % i for i in range(300)]

        async def talk() -> None:
            for number in numbers:
                await theirs.send(number)
                await asyncio.sleep(0)

        talking = asyncio.create_task(talk())
        got = []
        while len(got) < len(numbers):
            task = asyncio.create_task(stream.receive())
            await asyncio.sleep(0)
            task.cancel()
            try:
                got.append(await task)
            except asyncio.CancelledError:
                await asyncio.sleep(0.0005)
        assert got == numbers
        await talking

    run(main())


def test_send_waits_while_the_peer_does_not_receive(run: Run) -> None:
    async def main() -> None:
        stream, theirs, _ = await pair(framer=Lines())
        sent = 0

        async def flood() -> None:
            nonlocal sent
            while True:
                await theirs.send(bytes(10_000).replace(b"\0", b"x"))
                sent += 1

        flooding = asyncio.create_task(flood())
        before = -1
        while sent != before:
            before = sent
            await asyncio.sleep(0.1)
        assert 0 < theirs.connection.outbox_size < 200_000
        assert sum(map(len, stream._messages)) < 200_000, "what is not received is bounded, too"
        for _ in range(2 * sent):
            await stream.receive()
        flooding.cancel()
        assert sent > before

    run(main())


def test_a_cancelled_send_has_sent_its_message(run: Run) -> None:
    async def main() -> None:
        stream, theirs, _ = await pair(framer=Lines(max_size=1 << 20), limits=muxcore.Limits(low=0, high=1))
        count = 0
        while True:
            try:
                async with asyncio.timeout(0.05):
                    count += 1
                    await theirs.send(b"%d" % count + b"." * 100_000)
            except TimeoutError:
                break
        assert theirs._room == [], "a cancelled wait leaves nothing behind"
        for number in range(1, count + 1):
            assert (await stream.receive()).startswith(b"%d." % number)

    run(main())


def test_one_task_receives_at_a_time(run: Run) -> None:
    async def main() -> None:
        stream, theirs, _ = await pair(framer=Lines())
        receiving = asyncio.create_task(stream.receive())
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="another task is receiving"):
            await stream.receive()
        await theirs.send(b"for the first")
        assert await receiving == b"for the first"

    run(main())


def test_a_closed_stream_refuses_both_ways(run: Run) -> None:
    async def main() -> None:
        stream, theirs, _ = await pair(echo)
        await stream.aclose()
        with pytest.raises(muxcore.ConnectionClosed, match="send: the stream is closed"):
            await stream.send(b"x")
        with pytest.raises((muxcore.ConnectionClosed, EndOfStream)):
            await stream.receive()
        assert stream.reason is None
        assert theirs.reason is None

    run(main())


def test_aclose_waits_for_the_end_and_a_cancelled_one_aborts(run: Run) -> None:
    async def main() -> None:
        stream, theirs, _ = await pair()
        closing = asyncio.create_task(stream.aclose())
        with pytest.raises(EndOfStream):
            await theirs.receive()
        assert not closing.done(), "the peer has not closed its side"
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        await stream._wait_for(4)
        assert stream.connection.closed

    run(main())


@pytest.mark.parametrize("ends", ["receive", "send"])
def test_the_end_wakes_a_task_that_waits(run: Run, ends: str) -> None:
    async def main() -> None:
        stream, theirs, _ = await pair(limits=muxcore.Limits(low=0, high=1))

        async def waits() -> None:
            while True:
                await (theirs.receive() if ends == "receive" else theirs.send(bytes(1 << 20)))

        waiting = asyncio.create_task(waits())
        await asyncio.sleep(0.05)
        stream.connection.abort()
        with pytest.raises(OSError, match=r"reset|Broken pipe"):
            await waiting

    run(main())


# --- clients ---------------------------------------------------------------------------------------


def test_a_connect_that_fails_raises_its_reason(run: Run) -> None:
    async def main() -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            with pytest.raises(ConnectionRefusedError):
                await aio.connect(sock.getsockname())
        with pytest.raises(TypeError, match="limits"):
            await aio.connect(("127.0.0.1", 1), limits=5)  # type: ignore[arg-type]

    run(main())


def test_a_cancelled_connect_leaves_no_connection(run: Run) -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
            fillers = []
            for _ in range(4):  # the backlog is full: the next SYN gets no reply
                fillers.append(socket.socket())
                fillers[-1].setblocking(False)
                fillers[-1].connect_ex(server.getsockname())
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await aio.connect(server.getsockname())
            mux = await running_mux(aio.attach)
            while mux.stats().connections:
                await asyncio.sleep(0.01)
            for sock in fillers:
                sock.close()

    run(main())


def test_tls_and_its_refusal(run: Run) -> None:
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    server_context, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("localhost").configure_cert(server_context)

    async def main() -> None:
        async with await aio.serve(echo, LOCALHOST, tls=server_context) as server:
            address = server.listener.address
            with pytest.raises(ssl.SSLCertVerificationError):
                await aio.connect(address, tls=client, server_hostname="localhost")
            authority.configure_trust(client)
            async with await aio.connect(address, tls=client, server_hostname="localhost") as stream:
                await stream.send(b"hello")
                assert await stream.receive() == b"hello"
                assert stream.connection.tls.version() == "TLSv1.3"

    run(main())


def reported() -> list[Any]:
    """What the loop's exception handler gets from now on."""
    reports: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reports.append(context))
    return reports


# --- servers ---------------------------------------------------------------------------------------


def test_a_task_that_raises_is_reported_and_ends_its_connection(run: Run) -> None:
    async def main() -> None:
        reports = reported()

        async def fails(stream: Stream) -> None:
            await stream.receive()
            raise ZeroDivisionError

        stream, theirs, _ = await pair(fails)
        await stream.send(b"x")
        with pytest.raises(EndOfStream):
            await stream.receive()
        await stream.aclose()
        assert [type(context["exception"]) for context in reports] == [ZeroDivisionError]
        assert isinstance(theirs.reason, ZeroDivisionError)

    run(main())


def test_the_end_of_a_connection_is_not_reported(run: Run) -> None:
    async def main() -> None:
        reports = reported()

        async def receives(stream: Stream) -> None:
            while True:
                await stream.receive()

        for end in ("abort", "close"):
            stream, _, server = await pair(receives)
            getattr(stream.connection, end)()
            await server.wait_closed()
        assert reports == []

    run(main())


def test_a_closed_server_serves_what_it_has(run: Run) -> None:
    async def main() -> None:
        stream, _, server = await pair(echo)
        server.close()
        await stream.send(b"still")
        assert await stream.receive() == b"still"
        with pytest.raises(ConnectionRefusedError):
            await aio.connect((stream.connection.peer[0], stream.connection.peer[1]))
        waiting = asyncio.create_task(server.wait_closed())
        await asyncio.sleep(0)
        assert not waiting.done()
        await stream.aclose()
        await waiting

    run(main())


def test_a_cancelled_server_ends(run: Run) -> None:
    async def main() -> None:
        server = await aio.serve(echo, LOCALHOST)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await server.serve_forever()
        assert server.listener.closed

    run(main())


def test_a_task_group_of_clients(run: Run) -> None:
    async def main() -> None:
        async def client(address: Any, number: int) -> None:
            async with await aio.connect(address, framer=Lines()) as stream:
                for i in range(20):
                    await stream.send(b"%d %d" % (number, i))
                assert [await stream.receive() for _ in range(20)] == [b"%d %d" % (number, i) for i in range(20)]

        async with await aio.serve(echo, LOCALHOST, framer=Lines()) as server, asyncio.TaskGroup() as group:
            for number in range(50):
                group.create_task(client(server.listener.address, number))

    run(main())


# --- the loop --------------------------------------------------------------------------------------


@pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop_loop], ids=["asyncio", "uvloop"])
def test_what_was_sent_is_not_lost_when_the_loop_ends(factory: Any) -> None:
    data = pattern(5_000_000)

    async def main(address: Any) -> None:
        stream = await aio.connect(address)
        stream.connection.send(data)

    def receive(server: socket.socket) -> bytes:
        sock, _ = server.accept()
        with sock:
            got = bytearray()
            while piece := sock.recv(1 << 16):
                got += piece
            return bytes(got)

    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        got = pool.submit(receive, server)
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(main(server.getsockname()))
        assert got.result(20) == data


def test_loops_of_two_threads_have_a_mux_each() -> None:
    def work(results: list[Any]) -> None:
        async def main() -> None:
            stream, _, _ = await pair(echo, Lines())
            await stream.send(b"x")
            results.append((await stream.receive(), stream.connection.mux))

        asyncio.run(main())

    results: list[Any] = []
    threads = [threading.Thread(target=work, args=(results,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [message for message, _ in results] == [b"x", b"x"]
    assert results[0][1] is not results[1][1]


def test_a_bad_argument_is_named(run: Run) -> None:
    async def main() -> None:
        with pytest.raises(TypeError, match="handle must be a coroutine function"):
            await aio.serve(5, LOCALHOST)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="framer"):
            await aio.serve(echo, LOCALHOST, framer=5)

    run(main())
