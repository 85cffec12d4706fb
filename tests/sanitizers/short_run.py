"""What may live here: a short run through most of what the core does with memory, for valgrind and the leak checkers.

Ten rounds of the same: what is lost in each shows in their reports, and in the line that this prints.
"""

from __future__ import annotations

import gc
import socket
import tempfile
import threading
from collections.abc import Callable
from typing import Any

from support import Recorder, receive, reset, until

import muxcore

ROUNDS = 10


def served(mux: muxcore.Mux, framer: Any, data: bytes, reply: Callable[[muxcore.Connection, Any], object]) -> None:
    """One client sends `data` in pieces and reads the replies to the end."""
    listener = mux.listen(("127.0.0.1", 0), reply, framer=framer)
    with socket.create_connection(listener.address) as sock:
        for piece in (data[: len(data) // 3], data[len(data) // 3 :]):
            sock.sendall(piece)
            mux.poll(0)
        sock.shutdown(socket.SHUT_WR)
        receive(mux, sock)
    listener.close()


def echo(conn: muxcore.Connection, message: Any) -> None:
    conn.send(message)


def framers(mux: muxcore.Mux) -> None:
    served(mux, None, bytes(200_000), echo)
    served(mux, muxcore.Lines(), b"line\n" * 500, echo)
    served(mux, muxcore.Delimiter(b"--"), (b"x" * 3000 + b"--") * 20, echo)
    served(mux, muxcore.LengthPrefix(2), b"\x00\x03abc" * 100, echo)
    served(mux, muxcore.LengthPrefix("varint"), b"\x03abc" * 100, echo)
    served(mux, muxcore.Fixed(7), b"1234567" * 100, echo)
    request = b"*2\r\n$3\r\nGET\r\n$5\r\nvalue\r\n"
    served(mux, muxcore.Resp(), request * 100, lambda conn, request: conn.send([1, "OK", None, request]))
    served(mux, muxcore.Resp(), b"*1\r\n$-3\r\n", echo)  # malformed
    served(mux, muxcore.Lines(max_size=10), b"x" * 100, echo)  # too large


def endings(mux: muxcore.Mux) -> None:
    recorder = Recorder(bytes)
    listener = mux.listen(("127.0.0.1", 0), recorder)
    socks = [socket.create_connection(listener.address) for _ in range(5)]
    until(mux, lambda: len(recorder.connections) == len(socks))
    one, two, three, four, five = recorder.connections
    for conn in recorder.connections:
        conn.send(bytes(3_000_000))
        conn.send(b"small")
    one.abort()
    two.detach if two.outbox_size else two.detach().close()
    three.close()
    threading.Thread(target=four.send, args=(b"from a thread",)).start()
    five.data = five  # a cycle
    mux.broadcast(recorder.connections, b"all")
    for sock in socks:
        reset(sock)
    until(mux, lambda: recorder.count("close") == len(socks))
    listener.close()
    recorder.events.clear()


def pulled(mux: muxcore.Mux) -> None:
    ours, theirs = socket.socketpair()
    conn = mux.attach(ours, framer=muxcore.Lines())
    with theirs:
        theirs.sendall(b"one\ntwo\nthr")
        mux.poll(0)
        assert conn.recv() == b"one"
        conn.framer = muxcore.Fixed(2)
        assert conn.recv_all() == [b"tw", b"o\n", b"th"]
        with open(__file__, "rb") as file:  # noqa: PTH123
            conn.sendfile(file)  # is read at once
        with tempfile.TemporaryFile() as file:
            file.truncate(100_000)
            conn.sendfile(file)
        conn.close()
        receive(mux, theirs)
    mux.call_later(1000, print).cancel()
    until(mux, lambda: conn.closed)


def one_round() -> None:
    with muxcore.Mux(backend="epoll") as mux:
        framers(mux)
        endings(mux)
        pulled(mux)
        ours, theirs = socket.socketpair()
        mux.attach(ours, Recorder()).send(bytes(1_000_000))  # closed with it unsent
    theirs.close()
    with muxcore.Epoll() as epoll, socket.socket() as sock:
        epoll.register(sock, data=object())
        epoll.poll(0)
    gc.collect()


for _ in range(ROUNDS):
    one_round()
print(f"{ROUNDS} rounds")
