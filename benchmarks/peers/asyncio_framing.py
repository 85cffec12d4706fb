"""What may live here: asyncio Protocols that echo messages, found one by one, or split and joined as Python does best.

The command line says what ends a message, and which: `lines|length each|joined`. `main(new_event_loop)` also serves
uvloop. They do less than muxcore's framers: no limit on the size of a message, no carriage return before a newline.
"""

from __future__ import annotations

import asyncio
import struct
import sys

from asyncio_protocol import Echo, main

HEADER = struct.Struct(">I")


class Framed(Echo):
    """Keeps the unfinished message at the end of what was read; what a message is, subclasses say."""

    rest = b""

    def split(self, data: bytes) -> list[bytes]:
        raise NotImplementedError


class Lines(Framed):
    def split(self, data: bytes) -> list[bytes]:
        lines = (self.rest + data if self.rest else data).split(b"\n")
        self.rest = lines.pop()
        return lines


class EachLine(Lines):
    def data_received(self, data: bytes) -> None:
        for line in self.split(data):
            self.line_received(line)

    def line_received(self, line: bytes) -> None:
        self.transport.write(line + b"\n")


class JoinedLines(Lines):
    def data_received(self, data: bytes) -> None:
        lines = self.split(data)
        lines.append(b"")
        self.transport.write(b"\n".join(lines))


class Lengths(Framed):
    def split(self, data: bytes) -> list[bytes]:
        if self.rest:
            data = self.rest + data
        messages, position, end = [], 0, len(data)
        while end - position >= 4:
            start = position + 4
            stop = start + HEADER.unpack_from(data, position)[0]
            if stop > end:
                break
            messages.append(data[start:stop])
            position = stop
        self.rest = data[position:]
        return messages


class EachLength(Lengths):
    def data_received(self, data: bytes) -> None:
        for message in self.split(data):
            self.message_received(message)

    def message_received(self, message: bytes) -> None:
        self.transport.write(HEADER.pack(len(message)) + message)


class JoinedLengths(Lengths):
    def data_received(self, data: bytes) -> None:
        pack = HEADER.pack
        self.transport.write(b"".join([pack(len(message)) + message for message in self.split(data)]))


PROTOCOLS = {
    ("lines", "each"): EachLine,
    ("lines", "joined"): JoinedLines,
    ("length", "each"): EachLength,
    ("length", "joined"): JoinedLengths,
}


def chosen() -> type[Framed]:
    frame, style = sys.argv[1:]
    return PROTOCOLS[frame, style]


if __name__ == "__main__":
    main(asyncio.new_event_loop, chosen())
