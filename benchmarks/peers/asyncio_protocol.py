"""What may live here: an asyncio Protocol echo server with flow control. `main` also serves uvloop, and other
protocols."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import cast


class Echo(asyncio.Protocol):
    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()


def main(
    new_event_loop: Callable[[], asyncio.AbstractEventLoop], protocol: Callable[[], asyncio.Protocol] = Echo
) -> None:
    loop = new_event_loop()
    loop.add_signal_handler(signal.SIGTERM, loop.stop)
    server = loop.run_until_complete(loop.create_server(protocol, "127.0.0.1", 0, backlog=4096))
    print("listening", server.sockets[0].getsockname()[1], flush=True)
    loop.run_forever()


if __name__ == "__main__":
    main(asyncio.new_event_loop)
