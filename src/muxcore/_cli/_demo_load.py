"""What may live here: the demo's load: the kinds of clients, the loop that drives them, and what they saw.

Standard library only and nothing of muxcore, since this is the judge of muxcore. Byte p of the stream of client n is
POOL[(n * STRIDE + p) % POOL_SIZE], so that a byte lost, doubled, swapped or foreign is not what is expected.
"""

from __future__ import annotations

import heapq
import socket
import struct
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from random import Random
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector
from typing import Protocol

Address = tuple[str, int]

MIB = 1 << 20
POOL_SIZE = 1_048_583  # a prime: no power of two, no buffer size, divides it
STRIDE = 104_729
POOL = Random(1).randbytes(POOL_SIZE)
TWICE = POOL + POOL  # a piece that runs over the pool's end is still one slice
TWICE_VIEW = memoryview(TWICE)
PIECE = 256 * 1024  # at most this much is sent or received at once, so every client gets its turn
INPUT = bytearray(PIECE)
INPUT_VIEW = memoryview(INPUT)
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER, 0 seconds
REPORT_EVERY = 0.1
SLOW_BUFFER = 32 * 1024
SLOW_PIECE = 16 * 1024
SLOW_PAUSE = 0.03


class Crowd(Protocol):
    """The kinds of clients, with their numbers."""

    def clients(self, load: Load) -> Iterator[Client]: ...


@dataclass(frozen=True, slots=True)
class Mix:
    """How many clients of each kind, and how much each of them does."""

    chatty: int
    messages: int
    """Of each chatty client."""
    bulk: int
    bulk_mib: int
    slow: int
    slow_mib: int
    reset: int

    @property
    def connections(self) -> int:
        return self.chatty + self.bulk + self.slow + self.reset

    def clients(self, load: Load) -> Iterator[Client]:
        """Kinds come interleaved, so that every accept batch and every event batch has some of each."""
        kinds: list[type[Client]] = []
        kinds += [Chatty] * self.chatty
        kinds += [Bulk] * self.bulk
        kinds += [Slow] * self.slow
        kinds += [Reset] * self.reset
        Random(2).shuffle(kinds)
        amounts: dict[type[Client], int] = {
            Chatty: self.messages,
            Bulk: self.bulk_mib * MIB,
            Slow: self.slow_mib * MIB,
            Reset: self.messages,
        }
        for number, kind in enumerate(kinds):
            yield kind(load, number, amounts[kind])


@dataclass(slots=True)
class Result:
    """What the clients saw."""

    messages: int = 0
    """Chatty ones, and every MiB of bulk senders and slow readers."""
    verified: int = 0
    """Bytes that came back right, on connections that were not reset on purpose."""
    lost: int = 0
    """Bytes that were sent and did not come back, or came back wrong."""
    late: int = 0
    """Bytes that were on their way when the time was up. That is the machine's fault, mostly."""
    resets: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    """Why connections failed, and how many for that reason."""
    latencies_ns: array[int] = field(default_factory=lambda: array("q"))
    """Of each chatty message, from its send to its last byte back; ascending."""
    seconds: float = 0.0


class Client:
    """One connection: sends its stream, checks what comes back, half-closes at the end and expects EOF."""

    __slots__ = ("base", "goal", "load", "number", "received", "sent", "sock", "total", "watched")

    def __init__(self, load: Load, number: int, total: int) -> None:
        self.load = load
        self.number = number
        self.base = number * STRIDE
        self.total = total
        self.goal = total  # how much may be sent by now
        self.sent = self.received = self.watched = 0
        self.sock = socket.socket()

    def start(self, address: Address) -> None:
        self.sock.setblocking(False)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.connect_ex(address)  # in progress, or an error that the first send raises again
        self.watch(EVENT_WRITE)

    def watch(self, events: int) -> None:
        """Change the events that the loop watches for."""
        if events == self.watched:
            return
        if not events:
            self.load.selector.unregister(self.sock)
        elif not self.watched:
            self.load.selector.register(self.sock, events, self.on_ready)
        else:
            self.load.selector.modify(self.sock, events, self.on_ready)
        self.watched = events

    def on_ready(self, events: int) -> None:
        try:
            if events & EVENT_WRITE:
                self.push()
            if events & EVENT_READ:
                self.pull(PIECE)
        except BlockingIOError:
            pass
        except OSError as error:
            self.fail(error.strerror or str(error))

    def push(self) -> None:
        """Send some of what may be sent; the FIN follows the last byte."""
        start = (self.base + self.sent) % POOL_SIZE
        try:
            self.sent += self.sock.send(TWICE_VIEW[start : start + min(self.goal - self.sent, PIECE)])
        except BlockingIOError:
            pass
        if self.sent == self.total:
            self.sock.shutdown(socket.SHUT_WR)
        self.watch(self.wanted())

    def wanted(self) -> int:
        return EVENT_READ | EVENT_WRITE if self.sent < self.goal else EVENT_READ

    def pull(self, limit: int) -> None:
        """Receive, and compare with what was sent."""
        size = self.sock.recv_into(INPUT, limit)
        if not size:
            self.ended()
        elif self.received + size > self.sent:
            self.fail("more came back than was sent", size)
        elif not TWICE.startswith(INPUT_VIEW[:size], (self.base + self.received) % POOL_SIZE):
            self.fail("other bytes came back than were sent", size)
        else:
            self.received += size
            self.progressed()

    def progressed(self) -> None:
        """Right bytes came; most kinds just wait for more."""

    def ended(self) -> None:
        if self.received < self.total:
            self.fail("closed by the server before everything was back")
            return
        self.load.result.verified += self.received
        self.load.result.messages += self.message_count()
        self.close()

    def message_count(self) -> int:
        return self.total // MIB

    def fail(self, reason: str, wrong: int = 0) -> None:
        self.load.result.lost += max(wrong, self.sent - self.received)
        self.give_up(reason)

    def out_of_time(self) -> None:
        self.load.result.late += self.sent - self.received
        self.give_up("unfinished at the deadline")

    def give_up(self, reason: str) -> None:
        self.load.result.failures[reason] += 1
        self.close()

    def close(self) -> None:
        self.watch(0)
        self.sock.close()
        self.load.live.discard(self)


class Bulk(Client):
    """Sends as fast as it can and reads as fast as it can."""

    __slots__ = ()


class Chatty(Client):
    """Sends a message of 64 to 1024 bytes, waits until it is back, sends the next."""

    __slots__ = ("sent_at", "sizes")

    def __init__(self, load: Load, number: int, messages: int) -> None:
        sizes = [64 + (number * 37 + i * 131) % 961 for i in range(messages)]
        super().__init__(load, number, sum(sizes))
        self.sizes = iter(sizes)
        self.goal = next(self.sizes)
        self.sent_at = 0

    def push(self) -> None:
        if self.sent == self.received:  # a new message, not the rest of one
            self.sent_at = time.perf_counter_ns()
        super().push()

    def progressed(self) -> None:
        if self.received == self.goal:
            self.load.result.latencies_ns.append(time.perf_counter_ns() - self.sent_at)
            if self.goal < self.total:
                self.goal += next(self.sizes)
                self.push()

    def message_count(self) -> int:
        return 0  # `latencies_ns` has them


class Slow(Client):
    """Sends everything, half-closes, and reads a little now and then through a small window."""

    __slots__ = ()

    def start(self, address: Address) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW_BUFFER)
        super().start(address)
        self.load.call_later(SLOW_PAUSE, self)

    def wanted(self) -> int:
        return EVENT_WRITE if self.sent < self.goal else 0

    def on_time(self) -> None:
        try:
            self.pull(SLOW_PIECE)
        except BlockingIOError:
            pass
        except OSError as error:
            self.fail(error.strerror or str(error))
        if self in self.load.live:
            self.load.call_later(SLOW_PAUSE, self)


class Reset(Client):
    """Talks for a while like a chatty one, then sends much and resets the connection as the first of it comes back."""

    __slots__ = ("talks",)

    def __init__(self, load: Load, number: int, messages: int) -> None:
        super().__init__(load, number, 1 << 62)  # never sends a FIN
        self.talks = 1 + number * 7 % messages
        self.goal = 64

    def progressed(self) -> None:
        if self.talks > 0:
            if self.received == self.goal:
                self.talks -= 1
                self.goal += 64 if self.talks else MIB
                self.push()
            return
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self.load.result.resets += 1
        self.close()


class Load:
    """All clients and the loop that drives them."""

    def __init__(self, crowd: Crowd) -> None:
        self.selector = DefaultSelector()
        self.result = Result()
        self.clients = list(crowd.clients(self))
        self.live = set(self.clients)
        self.timers: list[tuple[float, int, Slow]] = []
        self.total = sum(client.total for client in self.clients if not isinstance(client, Reset))

    def call_later(self, seconds: float, client: Slow) -> None:
        heapq.heappush(self.timers, (time.monotonic() + seconds, client.number, client))

    def run(self, address: Address, deadline: float, on_progress: Callable[[float], object]) -> None:
        """Drive the clients until all are done or failed, or it is `deadline` (of time.monotonic)."""
        started = report_at = time.monotonic()
        for client in self.clients:
            client.start(address)
        while self.live:
            now = time.monotonic()
            if now >= deadline:
                for client in list(self.live):
                    client.out_of_time()
            if now >= report_at:
                on_progress(self.progress())
                report_at = now + REPORT_EVERY
            self._turn(min(self.timers[0][0] if self.timers else deadline, report_at, deadline))
        self.result.seconds = time.monotonic() - started
        self.result.messages += len(self.result.latencies_ns)
        self.result.latencies_ns = array("q", sorted(self.result.latencies_ns))

    def _turn(self, until: float) -> None:
        for key, events in self.selector.select(max(0.0, until - time.monotonic())):
            key.data(events)
        now = time.monotonic()
        while self.timers and self.timers[0][0] <= now:
            client = heapq.heappop(self.timers)[2]
            if client in self.live:
                client.on_time()

    def progress(self) -> float:
        """How much of all bytes has come back, 0 to 1."""
        waiting = sum(client.received for client in self.live if not isinstance(client, Reset))
        return (self.result.verified + waiting) / self.total if self.total else 1.0

    def close(self) -> None:
        for client in self.live:
            client.sock.close()  # and no more: an interrupt may have come in the middle of what close() would undo
        self.selector.close()


def run_load(address: Address, crowd: Crowd, deadline: float, on_progress: Callable[[float], object]) -> Result:
    """Put the clients of `crowd` on the server at `address`; on_progress gets a number from 0 to 1 now and then."""
    load = Load(crowd)
    try:
        load.run(address, deadline, on_progress)
    finally:
        load.close()
    return load.result


@contextmanager
def idle_connections(address: Address, count: int, deadline: float) -> Iterator[None]:
    """While inside, `count` connections are open that have exchanged one message each and are silent since.

    On the way out they have ended: the server has sent a FIN for each of theirs.
    """
    message = b"one message, and then silence"
    with ExitStack() as stack:
        socks = []
        for _ in range(count):
            sock = stack.enter_context(socket.create_connection(address, timeout=_left(deadline)))
            sock.sendall(message)
            back = b""
            while len(back) < len(message) and (data := sock.recv(len(message) - len(back))):
                back += data
            if back != message:
                raise ConnectionError("an idle connection did not get its one message back")
            socks.append(sock)
        yield
        for sock in socks:
            sock.settimeout(_left(deadline))
            sock.shutdown(socket.SHUT_WR)
        for sock in socks:
            if sock.recv(1):
                raise ConnectionError("an idle connection received bytes that it never sent")


def _left(deadline: float) -> float:
    return max(0.001, deadline - time.monotonic())
