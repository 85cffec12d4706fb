"""What may live here: what type checkers must accept and refuse; `make lint` runs them over it, no test does."""

from __future__ import annotations

import socket
from typing import Any, assert_type

import muxcore


class User:
    name = b""


class Chat(muxcore.Handler[User]):
    """`conn.data` has the type that the handler names."""

    def on_open(self, conn: muxcore.Connection[User]) -> None:
        conn.data = User()

    def on_message(self, conn: muxcore.Connection[User], message: bytes) -> None:
        assert_type(conn.data, User)
        conn.data = b"x"  # type: ignore[assignment]


class Plain:
    """No base class."""

    def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
        assert_type(conn.data, Any)


class Misspelt:
    def on_mesage(self, conn: muxcore.Connection, message: bytes) -> None: ...


class Swapped:
    def on_message(self, message: bytes, conn: muxcore.Connection) -> None: ...


class Box:
    def on_datagrams(self, datagram: muxcore.Datagram, messages: list[tuple[bytes, Any]]) -> None: ...


def line(conn: muxcore.Connection, message: bytes) -> bool:
    return conn.send(message)


def use(mux: muxcore.Mux, other: muxcore.HandlerLike, sock: socket.socket) -> None:
    for handler in (Chat(), Plain(), line, muxcore.Threaded(Chat()), other):
        mux.listen(("127.0.0.1", 0), handler)
    mux.connect(("127.0.0.1", 1), lambda conn, message: conn.send(message))
    mux.attach(sock)
    mux.datagram(None, Box())
    mux.datagram(None, lambda datagram, messages: datagram.close())
    mux.listen(("127.0.0.1", 0), Misspelt())  # type: ignore[arg-type]
    mux.listen(("127.0.0.1", 0), Swapped())  # type: ignore[arg-type]
    mux.listen(("127.0.0.1", 0), line(mux.attach(sock), b""))  # type: ignore[arg-type]
    mux.datagram(None, Chat())  # type: ignore[arg-type]
    for conn, flags in mux.poll():
        assert_type(flags, muxcore.Report)
        if flags & muxcore.READABLE:
            conn.close()
