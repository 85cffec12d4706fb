"""What may live here: a muxcore server that counts datagrams; one of a single byte requests the counts."""

from __future__ import annotations

import struct
from typing import Any

import muxcore

COUNTS = struct.Struct("=QQ")


class Counter:
    messages = size = 0

    def on_datagrams(self, datagram: muxcore.Datagram, batch: list[tuple[bytes, Any]]) -> None:
        messages, size = self.messages, self.size
        for data, address in batch:
            length = len(data)
            if length == 1:
                datagram.send(COUNTS.pack(messages, size), address)
            else:
                messages += 1
                size += length
        self.messages, self.size = messages, size


if __name__ == "__main__":
    with muxcore.Mux() as mux:
        print("listening", mux.datagram(("127.0.0.1", 0), Counter()).address[1], flush=True)
        mux.run()
