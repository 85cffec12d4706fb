"""What may live here: an asyncio server that counts datagrams. `main` also serves uvloop."""

from __future__ import annotations

import asyncio
import signal
import struct
from collections.abc import Callable
from typing import Any, cast

COUNTS = struct.Struct("=QQ")


class Counter(asyncio.DatagramProtocol):
    transport: asyncio.DatagramTransport
    messages = size = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str | Any, int]) -> None:
        if len(data) == 1:
            self.transport.sendto(COUNTS.pack(self.messages, self.size), addr)
        else:
            self.messages += 1
            self.size += len(data)


def main(new_event_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    loop = new_event_loop()
    loop.add_signal_handler(signal.SIGTERM, loop.stop)
    made = loop.create_datagram_endpoint(Counter, local_addr=("127.0.0.1", 0))
    transport, _ = loop.run_until_complete(made)
    print("listening", transport.get_extra_info("sockname")[1], flush=True)
    loop.run_forever()


if __name__ == "__main__":
    main(asyncio.new_event_loop)
