"""What may live here: the servers of `python -m muxcore bench`, each a program of its own: the command line says which
library, and what to do. It prints where it listens, like `python -m muxcore echo`, and ends with SIGTERM or SIGINT.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import socket
import sys

from .._impl import Connection, Listener, Mux
from ..framing import Lines, Resp
from ..handler import Handler
from ..server import serve
from . import _demo_asyncio

REDIS = ("--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--daemonize", "no", "--logfile", "/dev/null")


class Echo(Handler):
    def on_message(self, conn: Connection, message: bytes) -> None:
        conn.send(message)


class Store(Handler):
    """GET and SET of Redis."""

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}

    def on_message(self, conn: Connection, request: list[bytes]) -> None:
        match request:
            case [b"GET", key]:
                conn.send(self.values.get(key))
            case [b"SET", key, value]:
                self.values[key] = value
                conn.send("OK")


class EchoLines(_demo_asyncio.Echo):
    """Finds the lines, and writes once for all that a read brought."""

    __slots__ = ("rest",)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.rest = b""

    def data_received(self, data: bytes) -> None:
        *lines, self.rest = (self.rest + data).split(b"\n")
        self.transport.write(b"".join([line + b"\n" for line in lines]))


def listening(mux: Mux, listener: Listener) -> None:
    said(listener.address[1])


def said(port: int) -> None:
    print(f"listening on 127.0.0.1:{port}", flush=True)


def run_muxcore(work: str) -> None:
    handler, framer = {"echo": (Echo, None), "lines": (Echo, Lines()), "resp": (Store, Resp())}[work]
    serve(handler(), ("127.0.0.1", 0), framer=framer, ready=listening)


def run_redis() -> None:
    """This process becomes it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    said(port)  # it soon will
    os.execvp("redis-server", ["redis-server", *REDIS, "--port", str(port)])


def main(library: str, work: str) -> None:
    if library == "muxcore":
        run_muxcore(work)
    elif library == "redis-server":
        run_redis()
    else:  # asyncio, or one that is like it
        protocol = {"echo": _demo_asyncio.Echo, "lines": EchoLines}[work]
        with asyncio.Runner(loop_factory=importlib.import_module(library).new_event_loop) as runner:
            runner.run(_demo_asyncio.main(protocol))


if __name__ == "__main__":
    main(*sys.argv[1:])
