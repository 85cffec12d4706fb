"""What may live here: a socket that belongs to a Mux, and how it comes to be one."""

from __future__ import annotations

import socket

from ._typing import TYPE_CHECKING
from .errors import from_call

if TYPE_CHECKING:
    from typing import Any

SocketType = socket.SocketType  # its own methods, not the overrides of a user's class
PlainType = socket.socket


class OwnSocket(socket.socket):
    """A socket that is closed without a warning when it is collected: its Mux, which is collected with it, warns, and
    the collector finalises the two in any order."""

    __slots__ = ()

    def __del__(self) -> None:
        try:
            SocketType.close(self)  # socket.socket.close() fails for one that is half-made
        except OSError:
            pass  # the descriptor is gone all the same


def adopted(
    fd: int, kind: type[socket.socket] = socket.socket, sort: tuple[int, int, int] = (-1, -1, -1)
) -> Any:
    """A nonblocking socket object for a descriptor of ours. An interrupt leaves the descriptor open; a half-made object
    closes it.

    sort: its family, type and protocol; -1: the kernel says it.
    """
    sock = kind.__new__(kind)
    try:
        kind.__init__(sock, *sort, fd)
        SocketType.setblocking(sock, False)  # it would wait after socket.setdefaulttimeout
    except BaseException:
        SocketType.detach(sock)
        raise
    return sock


def shared(sock: socket.socket, kind: type[socket.socket]) -> Any:
    """A nonblocking socket of that class with the descriptor of the other one; one of them has to give it up."""
    sort = SocketType.family.__get__(sock), SocketType.type.__get__(sock), SocketType.proto.__get__(sock)
    return adopted(SocketType.fileno(sock), kind, sort)


def moved(sock: socket.socket, kind: type[socket.socket]) -> Any:
    """A nonblocking socket of that class with the descriptor of the other one, which keeps it if this raises."""
    new = shared(sock, kind)
    try:
        SocketType.detach(sock)
    except BaseException:
        if SocketType.fileno(sock) >= 0:
            SocketType.detach(new)
        raise
    return new


def close_socket(sock: socket.socket) -> None:
    try:
        sock.close()
    except OSError as error:  # the descriptor is gone all the same
        if not from_call(error):
            raise
