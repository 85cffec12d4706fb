"""What may live here: HTTP in a uvloop Protocol, as well as one can write it: one write for all that a read brought.
Parsing and answering are those of examples/httpd.py; with `bare` on the command line, those of a server that knows
nothing but how to answer one request.
"""

from __future__ import annotations

import asyncio
import sys
from typing import ClassVar, cast

import httptools
import uvloop
from asyncio_protocol import main
from muxcore_http import PLAIN, httpd


class Replies(list[bytes]):
    """What goes out after a read, in one write; to `send` costs no more than list.append."""

    __slots__ = ("transport",)
    send = list[bytes].append

    def __init__(self, transport: asyncio.Transport) -> None:
        self.transport = transport

    def close(self) -> None:
        self.transport.write(b"".join(self))
        self.clear()
        self.transport.close()


class Http(asyncio.Protocol):
    """Everything that the muxcore server has: limits, deadlines, timeouts, and no reading from who does not read."""

    site = httpd.Site()
    second = 0.0
    connections: ClassVar[set[Http]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.replies = Replies(self.transport)
        self.exchange = httpd.Exchange(self.site, self.replies)
        self.loop = asyncio.get_running_loop()
        self.late: asyncio.TimerHandle | None = None
        if not Http.second:
            self.every_second()
        self.active, self.stuck = Http.second, float("inf")
        self.connections.add(self)

    def every_second(self) -> None:
        self.site.tick()
        Http.second = now = self.loop.time()
        for conn in self.connections:
            if now - conn.active > httpd.KEEP_ALIVE:
                conn.transport.close()
            if now - conn.stuck > httpd.WRITE_TIMEOUT:
                conn.transport.abort()
        self.loop.call_later(1, self.every_second)

    def data_received(self, data: bytes) -> None:
        self.active = Http.second
        if self.exchange.receive(data):
            if self.late is not None:
                self.late.cancel()
                self.late = None
        elif self.late is None:
            self.late = self.loop.call_later(httpd.REQUEST_TIMEOUT, self.too_late)
        replies = self.replies
        if len(replies) == 1:
            self.transport.write(replies.pop())
        elif replies:
            self.transport.write(b"".join(replies))
            replies.clear()

    def too_late(self) -> None:
        self.exchange.refuse("408 Request Timeout")

    def connection_lost(self, exc: Exception | None) -> None:
        self.connections.remove(self)
        if self.late is not None:
            self.late.cancel()

    def pause_writing(self) -> None:
        self.transport.pause_reading()
        self.stuck = Http.second

    def resume_writing(self) -> None:
        self.transport.resume_reading()
        self.stuck = float("inf")


class Bare(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.replies: list[bytes] = []
        self.feed = httptools.HttpRequestParser(self).feed_data

    def data_received(self, data: bytes) -> None:
        self.feed(data)
        replies = self.replies
        if len(replies) == 1:
            self.transport.write(replies.pop())
        elif replies:
            self.transport.write(b"".join(replies))
            replies.clear()

    def on_url(self, url: bytes) -> None:
        self.url = url

    def on_message_complete(self) -> None:
        if self.url == b"/":
            self.replies.append(PLAIN)


if __name__ == "__main__":
    main(uvloop.new_event_loop, Bare if "bare" in sys.argv else Http)
