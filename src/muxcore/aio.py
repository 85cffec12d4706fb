"""What may live here: a Mux in a running asyncio loop, which drives it; servers and clients that are coroutines.

Imported on demand: `import muxcore.aio`.
"""

from __future__ import annotations

import asyncio

from ._coroutines import EndOfStream, Server, Stream, Streams, opened, running_mux
from ._mux import Mux
from ._typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket
    import ssl
    from collections.abc import Callable, Coroutine, Iterable
    from typing import Any, TypedDict, Unpack

    from ._address import Address
    from ._config import Limits, Timeouts

    class Options(TypedDict, total=False):
        framer: Any
        nodelay: bool
        keepalive: float | None
        user_timeout: float | None
        limits: Limits | None
        timeouts: Timeouts | None

    class ListenOptions(Options, total=False):
        backlog: int
        reuse_port: bool
        exclusive: bool
        mode: int | None
        max_connections: int | None
        tls: ssl.SSLContext | None
        proxy_protocol: Iterable[str] | None

    class ConnectOptions(Options, total=False):
        local_address: tuple[str, int] | None
        tls: ssl.SSLContext | bool | None
        server_hostname: str | None

__all__ = ["Attachment", "EndOfStream", "Server", "Stream", "attach", "connect", "serve"]


class Attachment:
    """A Mux that an asyncio loop drives; made by `attach`."""

    __slots__ = ("_fd", "_loop", "_mux")

    def __init__(self, mux: Mux, loop: asyncio.AbstractEventLoop) -> None:
        self._mux = mux
        self._loop = loop
        self._fd = mux.fileno()
        before = mux._attachment
        if before is not None and before._loop is loop:
            before.detach()  # a loop has one reader for a descriptor
        loop.add_reader(self._fd, self._turn)
        mux._detach()  # from another loop, which served it until now
        mux._attachment = self

    def detach(self) -> None:
        """Remove the Mux from the loop, so that `poll` and `run` work again. `Mux.close` does the same."""
        if self._mux._attachment is self:
            if not self._loop.is_closed():
                self._loop.remove_reader(self._fd)
            self._mux._attachment = None  # last: Mux.close calls this again after an interrupt

    def _turn(self) -> None:
        if self._mux.poll(0):
            raise RuntimeError("a connection without a handler needs poll(): asyncio cannot serve it")


def attach(mux: Mux, loop: asyncio.AbstractEventLoop) -> Attachment:
    """Run a Mux inside an asyncio or uvloop event loop. Call it in the loop's thread.

    Callbacks of the Mux then run between those of the loop, in the same thread. Coroutines may use the Mux and its
    connections, and callbacks may use the loop. The loop keeps its signal handlers. A Mux is attached to one loop at a
    time: a second call detaches it from the first loop.

    Raises ValueError for a backend without a descriptor for the loop to watch, TypeError for a bad argument, and
    RuntimeError if a connection or listener has no handler.
    """
    if not isinstance(mux, Mux):
        raise TypeError(f"mux must be a muxcore.Mux, not {type(mux).__name__}")
    if not isinstance(loop, asyncio.AbstractEventLoop):
        raise TypeError(f"loop must be an asyncio event loop, not {type(loop).__name__}")
    if mux._without_handler():
        raise RuntimeError("attach() serves handlers only: listeners and connections without one need poll()")
    return Attachment(mux, loop)


async def serve(
    handle: Callable[[Stream], Coroutine[Any, Any, object]],
    address: Address | socket.socket,
    **options: Unpack[ListenOptions],
) -> Server:
    """Serve connections in the running loop: each by a task that runs `handle(stream)`, and closes it in the end.

    options: as for `Mux.listen`. An exception of `handle` goes to the loop's exception handler, unless it is the end
    of the stream or its reason.

    Raises what `Mux.listen` raises, and ValueError without the compiled core, which a loop can drive.
    """
    if not callable(handle):
        raise TypeError(f"handle must be a coroutine function (stream), not {type(handle).__name__}")
    mux = await running_mux(attach)
    server = Server(handle)
    server.listener = mux.listen(address, Streams(server._begin), **options)
    return server


async def connect(address: Address, **options: Unpack[ConnectOptions]) -> Stream:
    """Connect, and return the Stream when it is open, with TLS after the handshake.

    options: as for `Mux.connect`. Raises what that raises, and the reason if the connection cannot be opened: an
    OSError, socket.gaierror, ConnectTimeout or ssl.SSLError. ValueError without the compiled core.
    """
    mux = await running_mux(attach)
    streams = Streams(None)
    conn = mux.connect(address, streams, **options)
    stream = streams.streams[conn] = Stream(conn)
    return await opened(stream)
