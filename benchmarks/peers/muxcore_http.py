"""What may live here: examples/httpd.py as a server to measure; with `bare` on the command line, a server that knows
nothing but how to reply to one request: no limits, no bodies, no errors, no date.
"""

from __future__ import annotations

import sys
from pathlib import Path

import httptools
from muxcore_callback import ready

import muxcore

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import httpd

PLAIN = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 13\r\n\r\nHello, World!"


class Bare(muxcore.Handler):
    def on_open(self, conn: muxcore.Connection) -> None:
        conn.data = httptools.HttpRequestParser(BareExchange(conn)).feed_data

    def on_message(self, conn: muxcore.Connection, data: bytes) -> None:
        conn.data(data)


class BareExchange:
    __slots__ = ("conn", "url")

    def __init__(self, conn: muxcore.Connection) -> None:
        self.conn = conn

    def on_url(self, url: bytes) -> None:
        self.url = url

    def on_message_complete(self) -> None:
        if self.url == b"/":
            self.conn.send(PLAIN)


def main() -> None:
    if "bare" in sys.argv:
        muxcore.serve(Bare(), ("127.0.0.1", 0), ready=ready)
        return
    site = httpd.Site()

    def listening(mux: muxcore.Mux, listener: muxcore.Listener) -> None:
        httpd.every_second(mux, site.tick)
        ready(mux, listener)

    timeouts = muxcore.Timeouts(idle=httpd.KEEP_ALIVE, write=httpd.WRITE_TIMEOUT)
    muxcore.serve(httpd.Server(site), ("127.0.0.1", 0), ready=listening, timeouts=timeouts)


if __name__ == "__main__":
    main()
