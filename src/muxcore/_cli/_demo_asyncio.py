"""What may live here: the demo's other server: asyncio as a careful person writes it, with nothing of muxcore.
`main` also serves other protocols.

Run as a program of its own; prints where it listens, like `python -m muxcore echo`, and ends with SIGTERM or SIGINT.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import cast


class Echo(asyncio.Protocol):
    """Echoes, and does not read while the client does not read."""

    __slots__ = ("transport",)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's has other ancestors

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()

    # eof_received is inherited: it returns None, so the transport closes once its buffer is flushed.


async def main(protocol: Callable[[], asyncio.Protocol] = Echo) -> None:
    """Serve until a signal; the backlog is muxcore's."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    server = await loop.create_server(protocol, "127.0.0.1", 0, backlog=4096)
    host, port = server.sockets[0].getsockname()
    print(f"listening on {host}:{port}", flush=True)
    await stop.wait()
    server.close()


if __name__ == "__main__":
    asyncio.run(main())
