"""What may live here: HTTP in a uvloop Protocol, as well as one can write it: one write for all that a read brought,
which is best where requests are pipelined, or with `direct` on the command line a write per reply, which is best where
they are not. Parsing and replies are those of examples/httpd.py; with `bare`, those of a server that knows nothing
but how to reply to one request.
"""

from __future__ import annotations

import asyncio
import sys
from typing import ClassVar, cast

import httptools
import uvloop
from asyncio_protocol import main
from muxcore_http import PLAIN, httpd

DIRECT = "direct" in sys.argv


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

    def write_eof(self) -> None:
        self.transport.write(b"".join(self))
        self.clear()
        self.transport.write_eof()

    def abort(self) -> None:
        self.transport.abort()


class Direct:
    """Each reply in a write of its own."""

    __slots__ = ("abort", "close", "send", "write_eof")

    def __init__(self, transport: asyncio.Transport) -> None:
        self.send, self.close = transport.write, transport.close
        self.write_eof, self.abort = transport.write_eof, transport.abort


class Http(asyncio.Protocol):
    """Everything that the muxcore server has: limits, deadlines, timeouts, a pause for a client that does not read."""

    site = httpd.Site()
    second = 0.0
    connections: ClassVar[set[Http]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.replies = Replies(self.transport)
        self.exchange = httpd.Exchange(self.site, Direct(self.transport) if DIRECT else self.replies)
        self.loop = asyncio.get_running_loop()
        self.late: asyncio.TimerHandle | None = None
        if not Http.second:
            self.every_second()
        self.active = self.moved = Http.second
        self.unsent = 0
        self.connections.add(self)

    def every_second(self) -> None:
        self.site.tick()
        Http.second = now = self.loop.time()
        for conn in self.connections:
            before, conn.unsent = conn.unsent, conn.transport.get_write_buffer_size()
            if not conn.unsent or conn.unsent < before:
                conn.moved = now
            if now - conn.moved > httpd.WRITE_TIMEOUT:
                conn.transport.abort()
            elif now - conn.active > httpd.KEEP_ALIVE and not conn.unsent:
                conn.transport.close()
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
        if self.exchange.refused:
            self.transport.abort()
        else:
            self.exchange.refuse("408 Request Timeout")
            self.late = self.loop.call_later(httpd.REFUSED_TIMEOUT, self.too_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self.connections.remove(self)
        if self.late is not None:
            self.late.cancel()

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()


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


class BareDirect(Bare):
    def data_received(self, data: bytes) -> None:
        self.feed(data)

    def on_message_complete(self) -> None:
        if self.url == b"/":
            self.transport.write(PLAIN)


if __name__ == "__main__":
    protocol = (BareDirect if DIRECT else Bare) if "bare" in sys.argv else Http
    main(uvloop.new_event_loop, protocol)
