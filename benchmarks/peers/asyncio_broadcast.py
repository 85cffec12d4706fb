"""What may live here: an asyncio server that sends every line it gets to all members. `main` also serves uvloop.

A member that is too slow gets nothing until it has caught up: memory stays bounded.
"""

from __future__ import annotations

import asyncio
import socket
from typing import cast

from asyncio_protocol import main

SEND_BUFFER = 65536

writable: dict[asyncio.Transport, None] = {}  # in order, as muxcore_broadcast.py has them


class Member(asyncio.Protocol):
    transport: asyncio.Transport
    rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        writable[self.transport] = None
        self.transport.write(b"hello\n")

    def data_received(self, data: bytes) -> None:
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            message = line + b"\n"
            for transport in tuple(writable):  # a write may call pause_writing
                transport.write(message)

    def pause_writing(self) -> None:
        writable.pop(self.transport, None)

    def resume_writing(self) -> None:
        writable[self.transport] = None

    def connection_lost(self, exc: Exception | None) -> None:
        writable.pop(self.transport, None)


if __name__ == "__main__":
    main(asyncio.new_event_loop, Member)
