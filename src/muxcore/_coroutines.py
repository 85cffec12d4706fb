"""What may live here: connections for coroutines, in any asyncio loop: the streams and servers of `muxcore.aio`.

Method names are those of anyio's streams.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from weakref import WeakKeyDictionary

from ._mux import Mux
from ._typing import TYPE_CHECKING
from .errors import ConnectionClosed, MuxError
from .handler import Handler

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
    from types import TracebackType
    from typing import Any, Self

    from ._epoll import Connection

OPENED, EOF, CLOSED = 1, 2, 4


class EndOfStream(MuxError, EOFError):
    """The peer has ended its side of the stream in good order, and all its messages were received."""


class Stream:
    """A connection for coroutines; `serve` and `connect` make it.

    `async for message in stream` receives messages up to the end of the stream. One task at a time may receive; any
    number may send. A cancelled call loses no message.
    """

    __slots__ = ("_arrival", "_ends", "_held", "_messages", "_room", "_state", "connection", "reason")

    def __init__(self, connection: Connection[Any]) -> None:
        self.connection: Any = connection
        """The Connection: `peer`, `tls`, `framer`, `data`, and the methods that need no wait."""
        self.reason: BaseException | None = None
        """Why it ended; None while it is open, and after an orderly end."""
        self._messages: deque[Any] = deque()
        self._state = 0  # the steps of its life that have come: OPENED, EOF, CLOSED
        self._held = False  # the pause of a stream whose messages are not received
        self._arrival: asyncio.Future[None] | None = None  # of the task that receives
        self._room: list[asyncio.Future[None]] = []  # of tasks that send
        self._ends: list[asyncio.Future[None]] = []  # of tasks that wait for the opening or for the end

    def __repr__(self) -> str:
        return f"<muxcore.aio.Stream of {self.connection!r}>"

    # -- messages in

    async def receive(self) -> Any:
        """The next message. Raises EndOfStream behind the last one, the reason of an end that was not orderly, and
        RuntimeError if another task receives."""
        messages = self._messages
        while not messages:
            if self._state & (EOF | CLOSED):
                raise self._why()
            await self._wait_for_arrival()
        message = messages.popleft()
        if self._held and not messages:
            self._hold(False)
        return message

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        try:
            return await self.receive()
        except EndOfStream:
            raise StopAsyncIteration from None

    async def _wait_for_arrival(self) -> None:
        if self._arrival is not None:
            raise RuntimeError("receive: another task is receiving from this stream")
        self._arrival = arrival = asyncio.get_running_loop().create_future()
        try:
            await arrival
        finally:
            self._arrival = None

    def _why(self) -> BaseException:
        if self._state & EOF and self.reason is None:
            return EndOfStream("receive: the stream has ended", conn=self.connection)
        if self.reason is None:
            return ConnectionClosed("receive: the stream is closed", conn=self.connection)
        return self.reason

    def _hold(self, on: bool) -> None:
        self._held = on
        if not self.connection.closed:
            self.connection.pause_reading() if on else self.connection.resume_reading()

    # -- messages out

    async def send(self, message: Any) -> None:
        """Send a message, with its framing; return when the outbox is at or below `Limits.high` again.

        Raises ConnectionClosed if the stream was closed, else the reason if it has ended; and what `Connection.send`
        raises. A cancelled call has sent its message.
        """
        self._check("send")
        if not self.connection.send(message):
            await self._wait_for_room()

    async def send_many(self, messages: Iterable[Any]) -> None:
        """`send` each message of an iterable, and wait once."""
        self._check("send_many")
        if not self.connection.send_many(messages):
            await self._wait_for_room()

    async def _wait_for_room(self) -> None:
        """Until the outbox has fallen to its low-water mark, as `on_drain` reports it."""
        if self.connection.closing:
            self._check("send")
            return
        await waiting_in(self._room)
        self._check("send")

    def _check(self, method: str) -> None:
        if self._state & CLOSED and self.reason is not None:
            raise self.reason
        if self.connection.closing:
            raise ConnectionClosed(f"{method}: the stream is closed", conn=self.connection)

    async def send_eof(self) -> None:
        """Half-close: the peer gets all output, then the end of the stream. Input continues."""
        self.connection.write_eof()

    # -- the end

    async def aclose(self) -> None:
        """Close as `Connection.close` does, and wait for the end. A cancelled call aborts the connection."""
        self.connection.close()
        try:
            await self._wait_for(CLOSED)
        except asyncio.CancelledError:
            self.connection.abort()
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _wait_for(self, step: int) -> None:
        while not self._state & step:
            await waiting_in(self._ends)

    # -- callbacks of the connection

    def _arrived(self, messages: list[Any]) -> None:
        if self._messages and not self._held:  # the last read's are not all received: no more after this one's
            self._hold(True)
        self._messages.extend(messages)
        self._wake()

    def _step(self, step: int) -> None:
        self._state |= step
        done(self._ends)
        if step == CLOSED:
            done(self._room)
        self._wake()

    def _wake(self) -> None:
        if self._arrival is not None:
            done([self._arrival])

    def _drained(self) -> None:
        done(self._room)


def done(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():  # else its task was cancelled
            future.set_result(None)


async def waiting_in(futures: list[asyncio.Future[None]]) -> None:
    """Wait as one of these. A cancelled wait leaves nothing behind."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    futures.append(future)
    try:
        await future
    finally:
        futures.remove(future)


class Streams(Handler[None]):
    """The callbacks of connections with streams."""

    def __init__(self, begin: Callable[[Stream], object] | None) -> None:
        self.streams: dict[Any, Stream] = {}
        self._begin = begin

    def on_open(self, conn: Connection[Any]) -> None:
        stream = self.streams.get(conn)
        if stream is None:
            stream = self.streams[conn] = Stream(conn)
        stream._step(OPENED)
        if self._begin is not None:
            self._begin(stream)

    def on_messages(self, conn: Connection[Any], messages: list[Any]) -> None:
        self.streams[conn]._arrived(messages)

    def on_drain(self, conn: Connection[Any]) -> None:
        self.streams[conn]._drained()

    def on_eof(self, conn: Connection[Any]) -> None:
        self.streams[conn]._step(EOF)

    def on_close(self, conn: Connection[Any], exc: BaseException | None) -> None:
        stream = self.streams.pop(conn, None)
        if stream is not None:  # else its handshake has failed
            stream.reason = exc
            stream._step(CLOSED)


class Server:
    """A listener whose connections are served by tasks, one for each; `serve` makes it.

    `async with` closes it, and then waits for its tasks.
    """

    __slots__ = ("_handle", "_tasks", "listener")

    def __init__(self, handle: Callable[[Stream], Coroutine[Any, Any, object]]) -> None:
        self._handle = handle
        self._tasks: set[asyncio.Task[None]] = set()
        self.listener: Any = None
        """The Listener; `listener.address` has the actual port."""

    def _begin(self, stream: Stream) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, stream: Stream) -> None:
        conn = stream.connection
        try:
            await self._handle(stream)
        except (MuxError, OSError) as error:
            if error is not stream.reason and not isinstance(error, ConnectionClosed | EndOfStream):
                self._report(stream, error)
        except Exception as error:
            self._report(stream, error)
        finally:
            conn.close()  # the linger goes on behind the task

    def _report(self, stream: Stream, error: Exception) -> None:
        # Without "task": asyncio would run the handler in its context, which is this one and cannot be entered twice.
        context = {"message": f"the task that serves {stream!r} raised", "exception": error}
        asyncio.get_running_loop().call_exception_handler(context)
        stream.connection.close(error)

    def close(self) -> None:
        """Stop listening. Open connections, and their tasks, continue."""
        self.listener.close()

    async def wait_closed(self) -> None:
        """Wait for the tasks of all connections."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def serve_forever(self) -> None:
        """Wait until this call is cancelled; then close."""
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
        await self.wait_closed()


# --- the Mux of a loop -----------------------------------------------------------------------------

LAST_SECONDS = 5.0

_muxes: WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[Mux, object]] = WeakKeyDictionary()


async def running_mux(attach: Callable[[Mux, asyncio.AbstractEventLoop], object]) -> Mux:
    """The Mux that the running loop drives for its streams; made by the first call."""
    loop = asyncio.get_running_loop()
    mux, _ = _muxes.get(loop, (None, None))
    if mux is None or mux.closed:
        mux = Mux()
        try:
            attach(mux, loop)
        except BaseException:
            mux.close()
            raise
        mux._batch_output()
        closer = _closed_with_the_loop(mux)
        _muxes[loop] = mux, closer
        await anext(closer)
    return mux


async def _closed_with_the_loop(mux: Mux) -> AsyncGenerator[None]:
    """asyncio.run ends the asynchronous generators of its loop, and so this one, when the tasks have ended. What was
    sent is not lost with the loop."""
    try:
        yield
    finally:
        for conn in mux.connections:
            conn.close()
        end = time.monotonic() + LAST_SECONDS
        while mux.stats().connections and time.monotonic() < end:
            await asyncio.sleep(0.005)
        mux.close()


async def opened(stream: Stream) -> Stream:
    """Wait until it is open. Raises the reason if it cannot be opened; a cancelled call aborts it."""
    try:
        await stream._wait_for(OPENED | CLOSED)
    except asyncio.CancelledError:
        stream.connection.abort()
        raise
    if not stream._state & OPENED:
        raise stream.reason or ConnectionClosed("connect: the connection was closed")
    return stream
