"""What may live here: the clients of the soak, beside those of the demo, and the loop that starts a new one for each
that ends.

Like those it uses nothing of muxcore, since it judges muxcore.
"""

from __future__ import annotations

import heapq
import socket
import ssl
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector
from typing import NamedTuple

from muxcore._cli._demo_load import (
    INPUT,
    MIB,
    PIECE,
    POOL_SIZE,
    SLOW_BUFFER,
    TWICE_VIEW,
    Address,
    Bulk,
    Chatty,
    Client,
    Load,
    Reset,
    Result,
    Slow,
)

FIXED = (100, 300, 600)  # the sizes that the server frames by, in turn
TICK = 0.05  # seconds
TICK_SIZE = 64
PATIENCE = 60.0  # seconds that a client may need


def tick(number: int) -> bytes:
    """A broadcast message that differs from all others."""
    return struct.pack(">Q", number) * (TICK_SIZE // 8)


class Reframed(Bulk):
    """A stream that the server frames anew after each message."""

    def message_count(self) -> int:
        return self.total // sum(FIXED) * len(FIXED)


class Idle(Client):
    """Sends something, and nothing more, until the server ends it."""

    def __init__(self, load: Load, number: int, size: int) -> None:
        super().__init__(load, number, size + 1)  # so that no FIN is sent
        self.goal = size

    def ended(self) -> None:
        self.total = self.goal
        super().ended()

    def message_count(self) -> int:
        return 1


class Doomed(Client):
    """One that the server may reset; the server's report has the reason."""

    def fail(self, reason: str, wrong: int = 0) -> None:
        if reason == "unfinished":
            super().fail(reason)
        else:
            self.load.result.resets += 1
            self.close()


class Stuck(Doomed):
    """Sends as much as the kernel accepts and reads nothing, until the server resets it."""

    def start(self, address: Address) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW_BUFFER)
        super().start(address)

    def wanted(self) -> int:
        return EVENT_WRITE


class Garbage(Doomed):
    """Sends random bytes and a FIN, and expects an end, and nothing else in particular."""

    def pull(self, limit: int) -> None:
        if not self.sock.recv_into(INPUT, limit):
            self.close()


class Member(Client):
    """Gets what is broadcast: each tick, in order, none left out; after some of them it leaves."""

    def __init__(self, load: Load, number: int, ticks: int) -> None:
        super().__init__(load, number, ticks * TICK_SIZE)
        self.rest = b""
        self.next = -1

    def push(self) -> None:
        self.watch(EVENT_READ)  # it is connected

    def pull(self, limit: int) -> None:
        size = self.sock.recv_into(INPUT, limit)
        if not size:
            self.ended()
            return
        self.received += size
        data = self.rest + INPUT[:size]
        for start in range(0, len(data) - TICK_SIZE + 1, TICK_SIZE):
            if self.next < 0:
                self.next = struct.unpack_from(">Q", data)[0]
            if data[start : start + TICK_SIZE] != tick(self.next):
                self.fail("another tick than the next one came", size)
                return
            self.next += 1
        self.rest = bytes(data[len(data) // TICK_SIZE * TICK_SIZE :])
        if self.received >= self.total and not self.sent:
            self.sent = 1
            self.sock.shutdown(socket.SHUT_WR)

    def ended(self) -> None:
        if self.rest:
            self.fail("closed in the middle of a tick", len(self.rest))
        else:
            super().ended()

    def message_count(self) -> int:
        return self.received // TICK_SIZE


class Datagrams(Client):
    """Sends a datagram, waits until it is back, sends the next; on this machine's own network none is lost."""

    def start(self, address: Address) -> None:
        self.sock.close()
        self.sock = socket.socket(type=socket.SOCK_DGRAM)
        self.sock.setblocking(False)
        self.sock.connect(address)
        self.watch(EVENT_WRITE)

    def piece(self) -> memoryview:
        start = (self.base + self.received) % POOL_SIZE
        return TWICE_VIEW[start : start + min(self.total - self.received, 64 + start % 1337)]

    def push(self) -> None:
        self.sent += self.sock.send(self.piece())
        self.watch(EVENT_READ)

    def pull(self, limit: int) -> None:
        size, piece = self.sock.recv_into(INPUT, limit), self.piece()
        if INPUT[:size] != piece:
            self.fail("another datagram came back than was sent", size)
            return
        self.received += size
        self.load.result.messages += 1
        if self.received == self.total:
            self.ended()
        else:
            self.watch(EVENT_WRITE)

    def message_count(self) -> int:
        return 0


class Secured(Client):
    """Over TLS, where the whole stream ends with close_notify, not with a half-close."""

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    sock: ssl.SSLSocket
    end = 0

    def start(self, address: Address) -> None:
        self.sock.close()
        self.sock = self.context.wrap_socket(socket.socket(), do_handshake_on_connect=False)
        self.end, self.total = self.total, self.total + 1  # so that no FIN is sent
        super().start(address)

    def on_ready(self, events: int) -> None:
        try:
            if self.sent < self.goal:  # a write or a read goes on with the handshake
                self.push()
            if events & EVENT_READ:
                self.pull(PIECE)
                while self in self.load.live and self.sock.pending():
                    self.pull(PIECE)
        except ssl.SSLWantReadError:
            self.watch(EVENT_READ)
        except ssl.SSLWantWriteError:
            self.watch(EVENT_READ | EVENT_WRITE)
        except OSError as error:
            self.fail(error.strerror or str(error))

    def progressed(self) -> None:
        if self.received < self.end:
            super().progressed()
            return
        self.total = self.end
        with suppress(ssl.SSLWantReadError):  # the peer's close_notify
            self.sock.unwrap()
        self.ended()


class SecuredChatty(Secured, Chatty):
    pass


class SecuredBulk(Secured, Bulk):
    pass


class Kind(NamedTuple):
    listener: str
    make: Callable[[Load, int, int], Client]
    clients: int
    """At a time; together with the outbound half of the relays no more than 500 connections."""
    size: int
    """How much each does, by its own measure."""
    reasons: frozenset[str]
    """Why the server's connection may end."""


ORDERLY = frozenset({"NoneType"})
BROKEN = frozenset({"ConnectionResetError", "BrokenPipeError"})
KINDS = [
    Kind("chatty", Chatty, 60, 50, ORDERLY),
    Kind("bulk", Bulk, 4, 2 * MIB, ORDERLY),
    Kind("slow", Slow, 60, MIB // 2, ORDERLY),
    Kind("reset", Reset, 20, 20, BROKEN | ORDERLY),
    Kind("threaded", Chatty, 20, 20, ORDERLY),
    Kind("reframed", Reframed, 10, 200 * sum(FIXED), ORDERLY),
    Kind("relay", Chatty, 30, 20, ORDERLY),
    Kind("relay", Reset, 10, 5, BROKEN | ORDERLY),
    Kind("relay", Slow, 10, MIB // 2, ORDERLY),
    Kind("too large", Garbage, 10, 5000, frozenset({"FrameTooLarge"})),
    Kind("garbage", Garbage, 10, 5000, BROKEN | ORDERLY | {"FrameError", "FrameTooLarge"}),
    Kind("room", Member, 50, 40, ORDERLY),
    Kind("idle", Idle, 50, 100, frozenset({"IdleTimeout"})),
    Kind("stuck", Stuck, 20, 1 << 62, frozenset({"WriteTimeout"})),
    Kind("datagrams", Datagrams, 10, 50_000, ORDERLY),
    Kind("tls", SecuredChatty, 20, 20, ORDERLY),
    Kind("tls", SecuredBulk, 2, MIB, ORDERLY),
]
NOT_STARTED = {"relay, outbound": BROKEN | ORDERLY, "bulk": BROKEN | ORDERLY, "refused": {"ConnectionRefusedError"}}


class Crowd(Load):
    """The clients of one kind, and what they have seen; the loop is the soak's."""

    def __init__(self, soak: Soak, kind: Kind, address: Address) -> None:
        self.kind, self.address = kind, address
        self.selector, self.timers, self.numbers = soak.selector, soak.timers, soak.numbers
        self.result = Result()
        self.live: set[Client] = set()
        self.started = 0
        self.late: dict[Client, float] = {}

    def refill(self, clients: int) -> None:
        while len(self.live) < clients:
            client = self.kind.make(self, next(self.numbers), self.kind.size)
            self.live.add(client)
            self.late[client] = time.monotonic() + PATIENCE
            self.started += 1
            client.start(self.address)

    def check(self) -> None:
        """End those that are too slow, and forget what is of no use for so many."""
        now = time.monotonic()
        for client, late in list(self.late.items()):
            if client not in self.live:
                del self.late[client]
            elif now > late:
                client.fail("unfinished")
        self.result.messages += len(self.result.latencies_ns)
        del self.result.latencies_ns[:]


class Soak:
    """All crowds. It starts a client for each that ends."""

    def __init__(self, addresses: dict[str, Address]) -> None:
        self.selector = DefaultSelector()
        self.timers: list[tuple[float, int, Slow]] = []
        self.numbers = count()
        self.crowds = [Crowd(self, kind, tuple(addresses[kind.listener])) for kind in KINDS]  # type: ignore[arg-type]

    def run(self, seconds: float, on_second: Callable[[], object], *, refill: bool = True) -> None:
        """Go on for so long; without `refill`, until all have ended."""
        now = second = time.monotonic()
        end = now + seconds
        while now < end and (refill or any(crowd.live for crowd in self.crowds)):
            for crowd in self.crowds if refill else ():
                crowd.refill(crowd.kind.clients)
            if now >= second:
                second += 1
                for crowd in self.crowds:
                    crowd.check()
                on_second()
            self.turn(min(second, end, self.timers[0][0] if self.timers else end) - now)
            now = time.monotonic()

    def turn(self, timeout: float) -> None:
        for key, events in self.selector.select(max(0.0, timeout)):
            key.data(events)
        now = time.monotonic()
        while self.timers and self.timers[0][0] <= now:
            client = heapq.heappop(self.timers)[2]
            if client in client.load.live:
                client.on_time()

    def close(self) -> None:
        for crowd in self.crowds:
            for client in crowd.live:
                client.sock.close()
        self.selector.close()
