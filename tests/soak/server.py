"""What may live here: the server of the soak: `server.py BACKEND MISTAKE`. It prints where it listens, and, when its
input ends, the callbacks that every connection got.

Each kind of client has a listener of its own, so that the ends of its connections can be counted by their reasons.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import ssl
import sys
import time
from collections import Counter
from itertools import cycle
from pathlib import Path
from typing import Any

from load import FIXED, TICK, TICK_SIZE, tick

import muxcore

try:
    from trustme import CA
except ImportError:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from openssl_ca import CA

LOCALHOST = ("127.0.0.1", 0)
NO_AUTOPAUSE = muxcore.Limits(autopause=False)


class Counted(muxcore.Handler):
    """An echo that counts the callbacks of its connections."""

    def __init__(self) -> None:
        self.opened = self.doubled = 0
        self.live: set[int] = set()
        self.reasons: Counter[str] = Counter()

    def on_open(self, conn: muxcore.Connection) -> None:
        self.opened += 1
        self.live.add(conn.id)

    def on_message(self, conn: muxcore.Connection, message: Any) -> None:
        conn.send(message)

    def on_close(self, conn: muxcore.Connection, exc: BaseException | None) -> None:
        self.doubled += conn.id not in self.live
        self.live.discard(conn.id)
        self.reasons[type(exc).__name__] += 1

    def report(self) -> dict[str, Any]:
        return {"opened": self.opened, "doubled": self.doubled, "missing": len(self.live), "reasons": self.reasons}


class Reframed(Counted):
    """Changes the framer after each message, in the middle of what has arrived."""

    def on_open(self, conn: muxcore.Connection) -> None:
        super().on_open(conn)
        conn.data = cycle(FIXED)
        conn.framer = muxcore.Fixed(next(conn.data))

    def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
        assert len(message) == conn.framer.size
        conn.framer = muxcore.Fixed(next(conn.data))
        conn.write(message)


class Blocking(Counted):
    """What it does is offloaded."""

    def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
        time.sleep(0.0005)
        conn.send(message)


class Replies(Counted):
    """Replies to garbage that happens to be a request."""

    def on_message(self, conn: muxcore.Connection, message: Any) -> None:
        conn.send("OK")


class Room(Counted):
    """Every member gets each tick, by broadcast."""

    def __init__(self, mux: muxcore.Mux) -> None:
        super().__init__()
        self.mux = mux
        self.number = 0
        self.members: dict[int, muxcore.Connection] = {}
        self.tick()

    def on_open(self, conn: muxcore.Connection) -> None:
        super().on_open(conn)
        self.members[conn.id] = conn

    def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
        raise AssertionError("members say nothing")

    def on_close(self, conn: muxcore.Connection, exc: BaseException | None) -> None:
        super().on_close(conn, exc)
        del self.members[conn.id]

    def tick(self) -> None:
        self.mux.broadcast(self.members.values(), tick(self.number))
        self.number += 1
        self.mux.call_later(TICK, self.tick)


class Relayed(Counted):
    """One end of a relay; the other one is its `data`. (examples/proxy.py explains how it works.)"""

    def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
        if not conn.data.send(message):
            conn.pause_reading()

    def on_drain(self, conn: muxcore.Connection) -> None:
        conn.data.resume_reading()

    def on_eof(self, conn: muxcore.Connection) -> None:
        conn.data.write_eof()

    def on_close(self, conn: muxcore.Connection, exc: BaseException | None) -> None:
        super().on_close(conn, exc)
        other, conn.data = conn.data, None
        if exc is None:
            other.close()
        else:
            other.abort()


class Relay(Relayed):
    """Connects every client to the echo, through the same Mux."""

    def __init__(self, target: Any) -> None:
        super().__init__()
        self.target = target
        self.back = Relayed()

    def on_open(self, conn: muxcore.Connection) -> None:
        super().on_open(conn)
        conn.data = conn.mux.connect(self.target, self.back, limits=NO_AUTOPAUSE)
        conn.data.data = conn


class Refused(muxcore.Handler):
    """Connects to a port without a listener, one attempt after the other: each ends with one on_close only."""

    def __init__(self, mux: muxcore.Mux) -> None:
        self.mux = mux
        self.sock = socket.socket()  # bound and not listening, so no other process can get this port
        self.sock.bind(LOCALHOST)
        self.opened, self.tried, self.reasons = 0, 0, Counter[str]()
        self.over = False

    def again(self) -> None:
        if self.over:
            self.sock.close()
            self.mux.stop()
            return
        self.tried += 1
        self.mux.connect(self.sock.getsockname(), self)
        self.mux.call_later(TICK, self.again)

    def finish(self) -> None:
        """End the server, after the last attempt."""
        self.over = True
        self.mux.remove_reader(0)

    def on_open(self, conn: muxcore.Connection) -> None:
        self.opened += 1

    def on_close(self, conn: muxcore.Connection, exc: BaseException | None) -> None:
        self.reasons[type(exc).__name__] += 1

    def report(self) -> dict[str, Any]:
        ended = self.reasons.total()
        doubled, missing = max(0, ended - self.tried), max(0, self.tried - ended)
        return {"opened": self.opened, "doubled": doubled, "missing": missing, "reasons": self.reasons}


def echo_datagrams(datagram: muxcore.Datagram, messages: list[tuple[bytes, Any]]) -> None:
    for data, address in messages:
        datagram.send(data, address)


class Planted(Counted):
    """An echo with a mistake in it, to see that the soak finds it."""

    def __init__(self, mistake: str) -> None:
        super().__init__()
        self.mistake = mistake
        self.messages = self.closed = 0
        self.leaked: list[object] = []
        self.null = os.open(os.devnull, os.O_RDONLY)

    def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
        self.messages += 1
        due = self.messages % 100 == 0
        if due and self.mistake == "loss":
            message = message[1:]
        elif due and self.mistake == "swap":
            message = message[::-1]
        elif due and self.mistake == "fd":
            self.leaked.append(os.dup(self.null))
        elif self.mistake == "memory":
            self.leaked.append(os.urandom(30_000))
        conn.send(message)

    def on_close(self, conn: muxcore.Connection, exc: BaseException | None) -> None:
        self.closed += 1
        due = self.closed % 10 == 0
        if not (due and self.mistake == "missing"):
            super().on_close(conn, exc)
        if due and self.mistake == "doubled":
            super().on_close(conn, exc)


def context() -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    CA().issue_cert("localhost").configure_cert(made)
    return made


def listen(mux: muxcore.Mux, mistake: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Listen with everything; the addresses and the handlers by their names."""
    names = ("chatty", "bulk", "slow", "reset", "threaded", "idle", "stuck", "tls")
    handlers: dict[str, Any] = {name: Counted() for name in names}
    handlers |= {"threaded": Blocking(), "reframed": Reframed(), "room": Room(mux)}
    handlers |= {"too large": Replies(), "garbage": Replies()}
    if mistake:
        handlers["chatty"] = Planted(mistake)
    options: dict[str, dict[str, Any]] = {
        "room": {"framer": muxcore.Fixed(TICK_SIZE)},
        "too large": {"framer": muxcore.LengthPrefix(4, max_size=1000)},
        "garbage": {"framer": muxcore.Resp(max_size=1000)},
        "idle": {"timeouts": muxcore.Timeouts(idle=3.0)},
        "stuck": {"timeouts": muxcore.Timeouts(write=1.0)},
        "tls": {"tls": context()},
    }
    addresses: dict[str, Any] = {}
    for name, handler in handlers.items():
        offloaded = muxcore.Threaded(handler) if name == "threaded" else handler
        addresses[name] = mux.listen(LOCALHOST, offloaded, **options.get(name, {})).address
    relay = handlers["relay"] = Relay(addresses["bulk"])
    handlers["relay, outbound"] = relay.back
    addresses["relay"] = mux.listen(LOCALHOST, relay, limits=NO_AUTOPAUSE).address
    addresses["datagrams"] = mux.datagram(LOCALHOST, echo_datagrams).address
    handlers["refused"] = Refused(mux)
    return addresses, handlers


def main(backend: str, mistake: str = "") -> None:
    logging.getLogger("muxcore").setLevel(logging.CRITICAL)
    with muxcore.Mux(backend=backend) as mux:
        addresses, handlers = listen(mux, mistake)
        mux.add_reader(0, handlers["refused"].finish)
        # From within the loop, which has by then all the descriptors that it keeps.
        mux.call_soon(lambda: print(json.dumps(addresses), flush=True))
        mux.call_later(TICK, handlers["refused"].again)
        mux.run()
        left = len(mux.connections)
        drained = mux.drain(10)
        print(json.dumps({
            "backend": mux.backend, "left": left, "drained": drained, "stats": mux.stats()._asdict(),
            "kinds": {name: handler.report() for name, handler in handlers.items()},
        }))  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
