"""What may live here: the files of Unix sockets, and the credentials of a peer.

Shared by every core; nothing here is hot. Without pathlib, which takes as long to import as half of muxcore, and with
socket only where there is one already (see Mux.__init__).
"""

from __future__ import annotations

import errno
import os
import stat
import sys

from ._log import log
from ._typing import TYPE_CHECKING, NamedTuple, explain

if TYPE_CHECKING:
    import socket

UCRED_SIZE = 12  # of SO_PEERCRED: pid_t, uid_t, gid_t


class SocketFile:
    """The file that a bind has made. No other can have its inode while the socket is open."""

    __slots__ = ("inode", "path")

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)  # the working directory may change
        self.inode = _inode(path)

    def remove(self) -> None:
        """Unlink it, unless another file is in its place by now. Only while the socket is open."""
        try:
            self._unlink()
        except OSError as error:
            log.warning("the socket file %s cannot be removed: %s", self.path, error)
        except BaseException:  # an interrupt, and the socket is about to be closed
            self._unlink()
            raise

    def _unlink(self) -> None:
        try:
            if _inode(self.path) == self.inode:
                os.unlink(self.path)
        except FileNotFoundError:
            pass


def bound_file(sock: socket.socket) -> SocketFile | None:
    """The file that the bind of a socket has made, if there is one: an interrupt may come between a bind and the line
    that keeps what it made, but the kernel knows."""
    path = sock.getsockname() if sock.fileno() >= 0 else None
    try:
        return SocketFile(path) if path and isinstance(path, str) else None
    except OSError:
        return None  # it is gone


def _inode(path: str) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino


def bind_path(sock: socket.socket, path: str, mode: int | None) -> SocketFile:
    """Bind to a path, where a stale socket file is replaced.

    mode: permission bits of the file; None leaves them to the umask.
    """
    if mode is not None and sys.platform == "linux":
        # umask(2) is the whole process's, and chmod(2) after bind would be late: a datagram socket receives from bind
        # on. But Linux makes the file with the permissions of the socket's own inode, less the umask (unix_bind_bsd).
        os.fchmod(sock.fileno(), mode)
    try:
        sock.bind(path)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        _remove_stale(path)
        sock.bind(path)
    if mode is not None:
        # Restores the bits that the umask cleared. Elsewhere all of it happens here, before listen() admits clients.
        os.chmod(path, mode)
    return SocketFile(path)


def _remove_stale(path: str) -> None:
    """Remove the socket file of a program that is gone; OSError with EADDRINUSE if it may be anything else.

    Two programs that start at the same time may both come to this for one path; then the later one has it.
    """
    import socket

    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return  # it has just ended
    if not stat.S_ISSOCK(found.st_mode):
        raise OSError(errno.EADDRINUSE, "a file that is not a socket has this path")
    # To connect a datagram socket disturbs no server: a stream socket that is still open returns EPROTOTYPE, even
    # between its bind() and listen(), and its program gets no event.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        result = probe.connect_ex(path)
    if result != errno.ECONNREFUSED:
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


class PeerCredentials(NamedTuple):
    """The process at the other end of a Unix connection: its ids at connect(2) or socketpair(2)."""

    pid: int
    uid: int
    gid: int


explain(PeerCredentials, {
    "pid": "Of the process; 0 if it is in a pid namespace that is not visible here.",
    "uid": "The effective user id.",
    "gid": "The effective group id.",
})


def peer_credentials(sock: socket.socket) -> PeerCredentials:
    """SO_PEERCRED; ValueError where there is none."""
    import socket

    if sock.family != getattr(socket, "AF_UNIX", None):
        raise ValueError(f"peer_credentials: only Unix sockets have them, not {socket.AddressFamily(sock.family).name}")
    if not hasattr(socket, "SO_PEERCRED"):
        raise ValueError(f"peer_credentials: Python has no SO_PEERCRED on {sys.platform}")
    return PeerCredentials(*memoryview(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED_SIZE)).cast("I"))
