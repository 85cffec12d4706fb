"""HTTP/1.1, parsed by httptools: plain text, JSON, an echo of what is posted. `httpd.py [--port PORT]`

    curl http://127.0.0.1:PORT/        curl http://127.0.0.1:PORT/json        curl --data hello http://127.0.0.1:PORT/echo

With `--cert FILE --key FILE`, a certificate and its private key in PEM, it serves HTTPS.

Connections are kept alive. Pipelined requests that one read brings get their replies with one system call. A request
that is too large, or too slow, gets an error status:

    400 what is not HTTP                                408 a request that is not complete after 10 seconds
    431 a head or trailer above 64 KiB                  413 a body of more than 1 MiB
"""

from __future__ import annotations

import argparse
import json
import ssl
from collections.abc import Callable
from email.utils import formatdate
from typing import Protocol

import httptools

import muxcore

MAX_HEAD = 64 * 1024
MAX_BODY = 1024 * 1024
REQUEST_TIMEOUT = 10.0  # for a whole request, also for a client that sends a byte now and then
KEEP_ALIVE = 75.0  # between requests
REFUSED_TIMEOUT = 5.0  # for a client to read why it was refused
WRITE_TIMEOUT = 30.0  # for a client that reads nothing of a reply
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
TEXT, JSON, BINARY = "text/plain; charset=utf-8", "application/json", "application/octet-stream"


class Refused(Exception):
    """A request that gets an error as its reply; what follows it on the connection gets none."""


class Site:
    """What is served, by whatever calls `Exchange.receive`."""

    def __init__(self) -> None:
        self.tick()

    def tick(self) -> None:
        """To be called every second: the date is in all replies, so those that only change with it are made here."""
        self.date = formatdate(usegmt=True)
        self.plain = {b"/": self.reply("200 OK", b"Hello, World!")}

    def reply(self, status: str, body: bytes, kind: str = TEXT, more: str = "") -> bytes:
        about = f"Date: {self.date}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{more}"
        return f"HTTP/1.1 {status}\r\n{about}\r\n".encode() + body

    def answer(self, method: bytes, url: bytes, body: bytes) -> bytes:
        match method, path_of(url):
            case b"GET" | b"HEAD", b"/":
                reply = self.plain[b"/"]
            case b"GET" | b"HEAD", b"/json":
                reply = self.reply("200 OK", json.dumps({"message": "Hello, World!"}).encode(), JSON)
            case b"POST" | b"PUT", b"/echo":
                reply = self.reply("200 OK", body, BINARY)
            case _, b"/" | b"/json" | b"/echo" as path:
                allowed = "POST, PUT" if path == b"/echo" else "GET, HEAD"
                reply = self.reply("405 Method Not Allowed", b"", more=f"Allow: {allowed}\r\n")
            case _:
                reply = self.reply("404 Not Found", b"there is no such page\n")
        return reply[: reply.index(b"\r\n\r\n") + 4] if method == b"HEAD" else reply


def path_of(url: bytes) -> bytes:
    """/path of /path?query, or of http://host/path?query, which a client may send as well (RFC 9112, 3.2.2)."""
    if not url.startswith(b"/"):
        scheme, _, rest = url.partition(b"://")
        url = b"/" + rest.partition(b"/")[2] if scheme.lower() in (b"http", b"https") else url
    return url.partition(b"?")[0]


class Output(Protocol):
    def send(self, data: bytes, /) -> object: ...
    def close(self) -> object: ...
    def write_eof(self) -> object: ...
    def abort(self) -> object: ...


class Exchange:
    """The requests of one connection. httptools calls the methods named on_..."""

    __slots__ = (
        "body", "expects", "finished", "head", "hosts", "last", "length", "out", "parser", "refused",
        "site", "url",
    )  # fmt: skip

    def __init__(self, site: Site, out: Output) -> None:
        self.site, self.out = site, out
        self.parser = httptools.HttpRequestParser(self)
        self.url = b""
        self.body: list[bytes] = []
        self.expects = False  # 100-continue, of a request that is not complete
        self.length = 0  # bytes of its body
        self.hosts = 0  # how often it names the host
        self.last = False  # nothing follows this request
        self.refused = False
        self.head = 0  # bytes since the last of a body, or the last end: of a head, a trailer, the size of a chunk

    def receive(self, data: bytes) -> bool:
        """Reply to the requests that are complete; whether there were any."""
        self.finished = False
        self.head += len(data)
        if self.refused:
            if self.head > MAX_BODY:
                self.out.abort()
            return False
        try:
            self.parser.feed_data(data)
            if self.finished:
                self.head = 0
            elif self.head > MAX_HEAD:
                self.refuse("431 Request Header Fields Too Large")
            if self.expects:
                self.expects = False
                self.out.send(CONTINUE)
        except httptools.HttpParserUpgrade:  # it gets a reply as any other; but what comes behind it may not be HTTP
            self.out.close()
        except httptools.HttpParserError as error:
            if isinstance(error, httptools.HttpParserCallbackError) and not isinstance(error.__context__, Refused):
                raise  # a mistake of ours
            self.refuse(str(error.__context__ or "400 Bad Request"))
        return self.finished

    def on_url(self, part: bytes) -> None:
        self.url = self.url + part if self.url else part

    def on_header(self, name: bytes, value: bytes) -> None:
        match len(name):
            case 4 if name.lower() == b"host":
                self.hosts += 1
            case 6 if name.lower() == b"expect":
                self.expects = value.lower() == b"100-continue"
            case 14 if name.lower() == b"content-length":
                if int(value) > MAX_BODY:
                    raise Refused("413 Content Too Large")
            case 10 if name.lower() == b"connection":  # in HTTP/1.0 it requests what we do not offer
                self.last = value.lower() == b"keep-alive" and self.parser.get_http_version() == "1.0"

    def on_headers_complete(self) -> None:
        if self.hosts != 1 or self.expects:
            is_1_0 = self.parser.get_http_version() == "1.0"
            if self.hosts > 1 or (self.hosts == 0 and not is_1_0):
                raise Refused("400 Bad Request")
            self.expects = self.expects and not is_1_0

    def on_body(self, part: bytes) -> None:
        self.head = 0
        self.body.append(part)
        self.length += len(part)
        if self.length > MAX_BODY:
            raise Refused("413 Content Too Large")

    def on_message_complete(self) -> None:
        method = self.parser.get_method()
        reply = self.site.plain.get(self.url) if method == b"GET" else None
        reply = reply or self.site.answer(method, self.url, b"".join(self.body))
        if self.last or self.parser.should_upgrade() or not self.parser.should_keep_alive():
            self.out.send(reply.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))  # behind the status
            self.out.close()  # what was sent still arrives
        else:
            self.out.send(reply)
        if self.body or self.expects:
            self.body, self.length, self.expects = [], 0, False
        self.url, self.hosts, self.finished = b"", 0, True

    def refuse(self, status: str) -> None:
        self.out.send(self.site.reply(status, status.encode() + b"\n", more="Connection: close\r\n"))
        self.out.write_eof()  # not close(), which would read and discard without a limit meanwhile
        self.refused, self.finished = True, False


class Server(muxcore.Handler):
    def __init__(self, site: Site) -> None:
        self.site = site
        self.late: dict[muxcore.Connection, muxcore.TimerHandle] = {}  # only those in the middle of a request

    def on_open(self, conn: muxcore.Connection) -> None:
        conn.data = Exchange(self.site, conn)

    def on_message(self, conn: muxcore.Connection, data: bytes) -> None:
        if conn.data.receive(data):
            if self.late and conn in self.late:
                self.late.pop(conn).cancel()
        elif conn not in self.late:
            self.late[conn] = conn.mux.call_later(REQUEST_TIMEOUT, self.too_late, conn)

    def too_late(self, conn: muxcore.Connection) -> None:
        if conn.data.refused:
            conn.abort()
            return
        conn.data.refuse("408 Request Timeout")
        self.late[conn] = conn.mux.call_later(REFUSED_TIMEOUT, self.too_late, conn)

    def on_close(self, conn: muxcore.Connection, exc: BaseException | None) -> None:
        if conn in self.late:
            self.late.pop(conn).cancel()


def every_second(mux: muxcore.Mux, fn: Callable[[], object]) -> None:
    fn()
    mux.call_later(1, every_second, mux, fn)


def main() -> None:
    parser = argparse.ArgumentParser(description="HTTP/1.1: plain text, JSON and an echo")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--cert", help="a certificate in PEM, for HTTPS")
    parser.add_argument("--key", help="its private key")
    args = parser.parse_args()
    tls = None
    if args.cert or args.key:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(args.cert, args.key)
    site = Site()

    def ready(mux: muxcore.Mux, listener: muxcore.Listener) -> None:
        every_second(mux, site.tick)
        print("listening", listener.address[1], flush=True)

    timeouts = muxcore.Timeouts(idle=KEEP_ALIVE, write=WRITE_TIMEOUT)
    muxcore.serve(Server(site), ("127.0.0.1", args.port), ready=ready, timeouts=timeouts, tls=tls)


if __name__ == "__main__":
    main()
