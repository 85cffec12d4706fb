"""What may live here: errnos by what they mean, and calls on one socket, as in _core/syscalls.pxd."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys

from .._address import DONTWAIT, INTERNET, NOSIGNAL
from .._own import close_socket
from .._typing import TYPE_CHECKING
from ..errors import from_call

if TYPE_CHECKING:
    from .._unix import SocketFile

SEND_FLAGS = NOSIGNAL | DONTWAIT


RESET_ON_CLOSE = (1).to_bytes(4, sys.byteorder) + bytes(4)  # SO_LINGER {on, 0}

# What send reports when the peer is gone. ECONNABORTED: Windows; EPROTOTYPE: macOS, while the socket is torn down.
PEER_GONE = {errno.EPIPE, errno.ECONNRESET, errno.ECONNABORTED, errno.EPROTOTYPE}
TRY_LATER = {errno.ENOBUFS, errno.ENOMEM}
NO_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
CLIENT_GONE = {errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.ETIMEDOUT, errno.ENETDOWN, errno.ENOPROTOOPT}
CLIENT_GONE |= {errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EOPNOTSUPP, errno.ENETUNREACH, getattr(errno, "ENONET", 0)}

TOO_LARGE = getattr(errno, "WSAEMSGSIZE", 0)  # the error of Windows for a datagram that does not fit


def discard_error_queue(sock: socket.socket) -> None:
    """Forget time stamps and the like, which poll reports as an error until they are read. Only the Internet's sockets
    have such a queue: a Unix socket ignores MSG_ERRQUEUE, and would give its input."""
    try:
        while sock.family in INTERNET and hasattr(socket, "MSG_ERRQUEUE"):
            sock.recvmsg(256, 0, socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT)
    except OSError as error:  # it is empty
        if not from_call(error):
            raise


def ensure_nonblocking(sock: socket.socket | None) -> None:
    """For accept, which takes no MSG_DONTWAIT: O_NONBLOCK belongs to the open file description, which other descriptors
    share, and Python's socket.dup() makes a listening one blocking."""
    if sock is not None and os.name == "posix":
        try:
            os.set_blocking(sock.fileno(), False)
        except OSError as error:  # accept reports the error
            if not from_call(error):
                raise


def send_file(sock: socket.socket, fd: int, offset: int, size: int, sent: list[int]) -> None:
    """os.sendfile, whose result is appended. It takes no MSG_NOSIGNAL: so the thread blocks SIGPIPE, and removes the
    one that an EPIPE has left. (A program may have let SIGPIPE end it, as it does by default outside of Python.)"""
    out = sock.fileno()
    if not hasattr(signal, "pthread_sigmask"):
        sent.extend(map(os.sendfile, (out,), (fd,), (offset,), (size,)))
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    was_pending = signal.SIGPIPE in signal.sigpending()
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGPIPE,))
        sent.extend(map(os.sendfile, (out,), (fd,), (offset,), (size,)))
    finally:
        try:
            if not was_pending and signal.SIGPIPE in signal.sigpending():
                signal.sigwait((signal.SIGPIPE,))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def discard_socket(sock: socket.socket, file: SocketFile | None) -> None:
    try:
        if file is not None:
            file.remove()
    finally:
        close_socket(sock)


def discard(sock: socket.socket) -> None:
    """Read and forget what woke us up."""
    try:
        sock.recv(256)
    except BlockingIOError as error:
        if not from_call(error):
            raise
