"""Random episodes against a whole server, and a model of it: python tests/fuzz/server.py SECONDS [SEED [BACKEND...]].

An episode is a list of steps, each a name and two numbers; so a finding stays what it was when the generator changes.
One that fails is made as short as it goes, and put into build/fuzz; copied into episodes/, it is a test for good.
"""

from __future__ import annotations

import fcntl
import json
import logging
import random
import socket
import struct
import sys
import tempfile
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from test_model import FILE, FRAMERS, fits, wire  # noqa: E402

import muxcore  # noqa: E402
from muxcore._custom import CustomReader  # noqa: E402
from muxcore._frame import NOTHING, Reader  # noqa: E402
from muxcore._impl import BACKENDS  # noqa: E402

UNSENT = 0x894B  # SIOCOUTQNSD: bytes that TCP has not sent yet; what is sent is there, on loopback, acknowledged or not
EPISODES = HERE / "episodes"
SIZES = [0, 1, 3, 5, 10, 100, 255, 3000, 9000]
TRICKS = ["pause", "reply", "close", "abort", "raise", "write_eof", "framer", "end another"]
LIMITS = muxcore.Limits(high=2000, low=500, max_outbox=20_000, max_inbox=1000, overflow="drop")
Step = tuple[str, int, int]


class Peer:
    """A client: what it has sent and got; and its connection: what was delivered and accepted there."""

    def __init__(self, sock: socket.socket, style: str) -> None:
        self.sock = sock
        self.style = style
        self.conn: Any = None
        self.sent, self.got = bytearray(), bytearray()
        self.delivered, self.accepted = bytearray(), bytearray()
        self.tricks: list[int] = []
        self.callbacks: list[str] = []
        self.broken = False  # by a reset: then both directions may be cut short
        self.ended = False  # the server's side has ended it, or begun to
        self.fin = self.left = False

    def receive(self, data: bytes) -> None:
        self.got += data
        assert self.accepted.startswith(self.got), "bytes arrived that were never sent"


class Episode(muxcore.Handler):
    """One run of steps."""

    def __init__(self, backend: str) -> None:
        self.mux = muxcore.Mux(backend=backend, read_size=1000, read_budget=2000)
        self.peers: list[Peer] = []
        self.by_address: dict[Any, Peer] = {}
        self.numbers = self.raised = 0
        batch = muxcore.Handler()
        batch.on_messages = self.on_batch  # type: ignore[method-assign]
        batch.on_open, batch.on_close = self.on_open, self.on_close  # type: ignore[method-assign]
        timeouts = muxcore.Timeouts(linger=0.2)
        self.listeners = [
            (style, self.mux.listen(("127.0.0.1", 0), handler, limits=LIMITS, timeouts=timeouts))
            for style, handler in (("message", self), ("batch", batch), ("pull", None))
        ]
        self.file = tempfile.TemporaryFile()  # noqa: SIM115
        self.file.write(FILE)
        self.file.flush()

    # -- callbacks of the server

    def on_open(self, conn: muxcore.Connection) -> None:
        self.opened(conn)

    def opened(self, conn: muxcore.Connection) -> None:
        peer = conn.data = self.by_address[conn.listener.address, conn.peer]
        peer.conn = conn
        peer.callbacks.append("open")
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

    def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
        self.deliver(conn, [message])

    def on_batch(self, conn: muxcore.Connection, messages: list[bytes]) -> None:
        self.deliver(conn, messages)

    def on_close(self, conn: muxcore.Connection, exc: BaseException | None) -> None:
        conn.data.callbacks.append("close")

    def deliver(self, conn: muxcore.Connection, messages: list[bytes]) -> None:
        peer = conn.data
        assert peer.callbacks == ["open"], "a message outside of a connection's life"
        assert not conn.closing, "a message after close()"
        for message in messages:
            peer.delivered += wire(conn.framer, message)
        assert peer.sent.startswith(peer.delivered), "messages that were never sent"
        if peer.tricks:
            self.trick(peer, peer.tricks.pop(), messages[0])

    def trick(self, peer: Peer, number: int, message: bytes) -> None:
        conn, name = peer.conn, TRICKS[number % len(TRICKS)]
        if name == "reply":
            self.accept(peer, message, lambda: conn.write(message))
        elif name == "pause":
            conn.pause_reading()
        elif name == "framer":
            conn.framer = FRAMERS[number % len(FRAMERS)]
        elif name == "end another":
            self.do("close" if number % 2 else "abort", number, 0)
        elif name == "raise":
            peer.ended = True
            if peer.style != "pull":
                self.raised += 1
                raise ZeroDivisionError
            conn.close()
        else:
            self.do(name, self.peers.index(peer), 0)

    # -- steps

    def do(self, name: str, number: int, size: int) -> None:
        if name in ("poll", "connect", "broadcast"):
            getattr(self, "do_" + name)(number, size)
        elif self.peers:
            peer = self.peers[number % len(self.peers)]
            step = getattr(self, "do_" + name)
            if name.startswith("peer_"):
                if not peer.left:
                    step(peer, size)
            elif peer.conn is not None and peer.callbacks == ["open"]:
                step(peer, peer.conn, size)

    def body(self, size: int) -> bytes:
        """Bytes that are not those of any other body."""
        self.numbers += 1
        size = SIZES[size % len(SIZES)]
        return (b"%d." % self.numbers * size)[:size]

    def accept(self, peer: Peer, data: bytes, send: Callable[[], object]) -> None:
        before = self.mux.stats().messages_out
        send()
        if self.mux.stats().messages_out > before:
            peer.accepted += data

    def do_connect(self, number: int, size: int) -> None:
        style, listener = self.listeners[number % 3]
        sock = socket.socket()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(listener.address)
        sock.setblocking(False)
        peer = self.by_address[listener.address, sock.getsockname()] = Peer(sock, style)
        self.peers.append(peer)

    def do_poll(self, number: int, size: int) -> None:
        for conn, events in self.mux.poll(0):
            if events & muxcore.OPENED:
                self.opened(conn)
            if events & muxcore.CLOSED:
                conn.data.callbacks.append("close")

    def do_broadcast(self, number: int, size: int) -> None:
        # The limits drop rather than raise, so what is queued or sent shows which connections accepted it.
        message = self.body(size)
        for peer in self.peers:
            if peer.conn is not None and fits(peer.conn.framer, message):
                data = wire(peer.conn.framer, message)
                self.accept(peer, data, lambda conn=peer.conn: self.mux.broadcast([conn], message))

    def do_send(self, peer: Peer, conn: Any, size: int) -> None:
        message = self.body(size)
        if fits(conn.framer, message):
            self.accept(peer, wire(conn.framer, message), lambda: conn.send(message))

    def do_write(self, peer: Peer, conn: Any, size: int) -> None:
        data = self.body(size)
        self.accept(peer, data, lambda: conn.write(data))

    def do_sendfile(self, peer: Peer, conn: Any, size: int) -> None:
        offset, count = SIZES[size % 9], SIZES[size % 7]
        self.accept(peer, FILE[offset : offset + count], lambda: conn.sendfile(self.file, offset, count))

    def do_flush(self, peer: Peer, conn: Any, size: int) -> None:
        conn.flush()

    def do_pause(self, peer: Peer, conn: Any, size: int) -> None:
        conn.pause_reading()

    def do_resume(self, peer: Peer, conn: Any, size: int) -> None:
        conn.resume_reading()

    def do_framer(self, peer: Peer, conn: Any, size: int) -> None:
        conn.framer = FRAMERS[size % len(FRAMERS)]

    def do_close(self, peer: Peer, conn: Any, size: int) -> None:
        peer.ended = True
        conn.close()

    def do_abort(self, peer: Peer, conn: Any, size: int) -> None:
        peer.broken = True
        conn.abort()

    def do_write_eof(self, peer: Peer, conn: Any, size: int) -> None:
        conn.write_eof()

    def do_trick(self, peer: Peer, conn: Any, size: int) -> None:
        peer.tricks.append(size)

    def do_take(self, peer: Peer, conn: Any, size: int) -> None:
        if peer.style == "pull" and size % 3 == 0:
            if (messages := conn.recv_all()):
                self.deliver(conn, messages)
        elif peer.style == "pull":
            for message in conn:
                self.deliver(conn, [message])

    def do_peer_send(self, peer: Peer, size: int) -> None:
        framer, body = FRAMERS[size % len(FRAMERS)], self.body(size)
        data = wire(framer, body) if fits(framer, body) else body
        try:
            if not peer.fin:
                peer.sent += data[: peer.sock.send(data)]
        except BlockingIOError:
            pass
        except OSError:
            self.peer_ended(peer)

    def do_peer_flood(self, peer: Peer, size: int) -> None:
        for i in range(20):
            self.do_peer_send(peer, size + i)

    def do_peer_read(self, peer: Peer, size: int) -> None:
        try:
            data = peer.sock.recv(1 + SIZES[size % len(SIZES)])
        except BlockingIOError:
            return
        except OSError:
            return
        peer.receive(data)

    def peer_ended(self, peer: Peer) -> None:
        """The server has reset the connection: what had arrived may still be there."""
        try:
            while data := peer.sock.recv(1 << 16):
                peer.receive(data)
        except OSError:
            pass

    def do_peer_fin(self, peer: Peer, size: int) -> None:
        peer.fin = True
        try:
            peer.sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def do_peer_reset(self, peer: Peer, size: int) -> None:
        peer.broken = peer.left = True
        peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.sock.close()

    # -- the end

    def finish(self) -> None:
        """Every peer reads, and nothing is held back; then every peer ends."""
        for peer in self.peers:
            peer.tricks = []
        self.settle()
        for peer in self.peers:
            if peer.conn is not None and not (peer.broken or peer.conn.closing):
                self.nothing_is_held_back(peer)
                assert peer.conn.unread == peer.sent[len(peer.delivered) :]
                assert peer.conn.outbox_size == 0
        for i in range(len(self.peers)):
            self.do(["close", "peer_fin"][i % 2], i, 0)
        deadline = time.monotonic() + 10
        while len(self.mux.connections):
            assert time.monotonic() < deadline, f"{list(self.mux.connections)} do not end"
            self.settle()
            for peer in self.peers:
                if peer.conn is not None and peer.conn.closing and not peer.fin and not peer.left:
                    self.do_peer_fin(peer, 0)
            self.mux.call_later(0.001, int)
        self.settle()
        for peer in self.peers:
            assert peer.callbacks == ["open", "close"], f"{peer.style}: {peer.callbacks}"
            if not peer.broken and not isinstance(peer.conn.error, OSError):
                assert peer.got == peer.accepted, f"{len(peer.got)} of {len(peer.accepted)} bytes: {peer.conn!r}"
                if peer.fin and not peer.ended:
                    self.nothing_is_held_back(peer)

    def settle(self) -> None:
        """Go on until nothing happens any more, and nothing is on its way."""
        moved, deadline = None, time.monotonic() + 5
        while moved != (moved := self.moved()) or (self.on_its_way() and time.monotonic() < deadline):
            for _ in range(3):
                self.do_poll(0, 0)
                for i, peer in enumerate(self.peers):
                    self.do("resume", i, 0)
                    self.do("take", i, 1)
                    if not peer.left:
                        self.do_peer_read(peer, 8)

    def moved(self) -> int:
        n = self.mux.stats()
        return n.bytes_in + n.bytes_out + n.messages_in - n.connections + sum(len(peer.got) for peer in self.peers)

    def on_its_way(self) -> bool:
        """Whether a kernel still holds something. (Between small buffers, TCP is slow.)"""
        for peer in self.peers:
            conn = peer.conn
            if conn is None:
                return True
            if not peer.left and held(peer.sock, termios.FIONREAD):
                return True
            if not peer.left and conn is not None and not conn.closed:
                if conn.outbox_size or held(conn, UNSENT) or held(peer.sock, UNSENT):
                    return True
                if conn.is_reading() and held(conn, termios.FIONREAD):
                    return True
        return False

    def nothing_is_held_back(self, peer: Peer) -> None:
        rest, framer = bytes(peer.sent[len(peer.delivered) :]), peer.conn.framer
        reader = Reader(framer) if framer is None or not callable(framer) else CustomReader(framer)
        reader.feed(rest)
        assert reader.peek(False) is NOTHING, "a message is held back"

    def close(self) -> None:
        for peer in self.peers:
            peer.sock.close()
        self.mux.close()
        self.file.close()


def held(sock: Any, request: int) -> int:
    return int.from_bytes(fcntl.ioctl(sock.fileno(), request, bytes(4)), sys.byteorder) if sock.fileno() >= 0 else 0


NAMES = [name.removeprefix("do_") for name in vars(Episode) if name.startswith("do_")]
# The ends of connections are rare, or there would be nothing to end.
WEIGHTS = [1 if name in ("close", "abort", "write_eof", "peer_fin", "peer_reset") else 8 for name in NAMES]


def generated(seed: int) -> list[Step]:
    rng = random.Random(seed)
    names = rng.choices(NAMES, WEIGHTS, k=rng.randrange(10, 120))
    steps = [(name, rng.randrange(1000), rng.randrange(1000)) for name in names]
    return [("connect", rng.randrange(3), 0), ("poll", 0, 0), *steps]


def play(backend: str, steps: list[Step]) -> None:
    """Raises if what happens is not what the model says."""
    episode = Episode(backend)
    try:
        for step in steps:
            episode.do(*step)
        episode.finish()
        assert episode.mux.stats().handler_errors == episode.raised, "more was raised than the handlers have"
    finally:
        episode.close()


def shortened(backend: str, steps: list[Step], seconds: float = 60) -> list[Step]:
    """As few of the steps as still fail."""
    deadline, size = time.monotonic() + seconds, len(steps) // 2
    while size and time.monotonic() < deadline:
        for start in range(len(steps) - size, -1, -size):
            fewer = steps[:start] + steps[start + size :]
            try:
                play(backend, fewer)
            except Exception:
                steps = fewer
        size //= 2
    return steps


def main(seconds: str, seed: str = "", *backends: str) -> int:
    logging.getLogger("muxcore").setLevel(logging.CRITICAL)
    number, count, end = int(seed or time.time_ns() % 1_000_000_000), 0, time.monotonic() + float(seconds)
    names = backends or tuple(name for name in ("epoll", "poll", "select") if name in BACKENDS)
    while time.monotonic() < end:
        backend = names[count % len(names)]
        try:
            play(backend, generated(number))
        except Exception as error:
            found = HERE.parent.parent / "build" / "fuzz" / f"{backend}-{number}.json"
            found.parent.mkdir(parents=True, exist_ok=True)
            found.write_text(json.dumps(shortened(backend, generated(number))))
            print(f"{backend}, seed {number}: {error!r}\nThe episode is in {found}: copy it into {EPISODES}.")
            return 1
        number += 1
        count += 1
    print(f"{count} episodes, seeds {number - count} to {number - 1}, on {', '.join(names)}: nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
