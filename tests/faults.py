"""What may live here: a verified load, and faults in the calls that the core makes meanwhile; run by test_faults.py.

python faults.py BACKEND STRIDE SPAN NAME..., with tests/faults.c preloaded: for each call NAME, each of its errnos and
short counts, and each n (or only each STRIDE-th): run the load with a fault in the n-th call and the SPAN - 1 that
follow it. Prints a JSON object.

Everything happens in one thread: the clients, which are checked, have their turn between the turns of the loop.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import json
import logging
import os
import socket
import ssl
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from errno import (
    EACCES,
    EADDRINUSE,
    EADDRNOTAVAIL,
    EAFNOSUPPORT,
    EAGAIN,
    EALREADY,
    EBADF,
    ECANCELED,
    ECONNABORTED,
    ECONNREFUSED,
    ECONNRESET,
    EDESTADDRREQ,
    EDQUOT,
    EEXIST,
    EFAULT,
    EFBIG,
    EHOSTUNREACH,
    EINPROGRESS,
    EINTR,
    EINVAL,
    EIO,
    EISCONN,
    EISDIR,
    ELOOP,
    EMFILE,
    EMSGSIZE,
    ENETDOWN,
    ENETUNREACH,
    ENFILE,
    ENOBUFS,
    ENODEV,
    ENOENT,
    ENOMEM,
    ENOPROTOOPT,
    ENOSPC,
    ENOSYS,
    ENOTCONN,
    ENOTSOCK,
    ENOTTY,
    EOPNOTSUPP,
    EOVERFLOW,
    EPERM,
    EPIPE,
    EPROTO,
    EPROTONOSUPPORT,
    ESPIPE,
    ETIMEDOUT,
)  # fmt: skip
from typing import Any

import trustme

import muxcore
import muxcore._fallback.wire
from muxcore._wire import Wire

SENDTO = [EACCES, EAGAIN, EALREADY, EBADF, ECONNREFUSED, ECONNRESET, EDESTADDRREQ, EFAULT, EINTR, EINVAL, EISCONN,
          EMSGSIZE, ENOBUFS, ENOMEM, ENOTCONN, ENOTSOCK, EOPNOTSUPP, EPERM, EPIPE]  # fmt: skip
# The errors of each call, as its man page and those of the protocols list them; less than 0: it handles at most so many
# bytes or events. What only a bug of ours could cause (EBADF, EFAULT) is there, too: it must not crash.
FAULTS: dict[str, list[int]] = {
    "epoll_create1": [EINVAL, EMFILE, ENFILE, ENOMEM],
    "epoll_add": [EBADF, EEXIST, EINVAL, ELOOP, ENOENT, ENOMEM, ENOSPC, EPERM],
    "epoll_mod": [EBADF, EINVAL, ENOENT, ENOMEM, EPERM],
    "epoll_del": [EBADF, ENOENT],
    "epoll_wait": [-1, EBADF, EFAULT, EINTR, EINVAL],
    "epoll_pwait2": [-1, EBADF, EFAULT, EINTR, EINVAL, ENOSYS, EPERM],
    "eventfd": [EINVAL, EMFILE, ENFILE, ENODEV, ENOMEM],
    "read": [EAGAIN, EBADF, EFAULT, EINTR, EINVAL, EIO, EISDIR],
    "write": [EAGAIN, EBADF, EDQUOT, EFAULT, EFBIG, EINTR, EINVAL, EIO, ENOSPC, EPERM, EPIPE],
    "timerfd_create": [EINVAL, EMFILE, ENFILE, ENODEV, ENOMEM, EPERM],
    "timerfd_settime": [EBADF, ECANCELED, EFAULT, EINVAL],
    "accept4": [EAGAIN, EBADF, ECONNABORTED, EFAULT, EHOSTUNREACH, EINTR, EINVAL, EMFILE, ENETDOWN, ENFILE, ENOBUFS,
                ENOMEM, ENOTSOCK, EOPNOTSUPP, EPERM, EPROTO, ETIMEDOUT],
    "recv": [-1, -1000, EAGAIN, EBADF, ECONNREFUSED, ECONNRESET, EFAULT, EINTR, EINVAL, ENOMEM, ENOTCONN, ENOTSOCK,
             ETIMEDOUT],
    "send": [-1, -1000, EACCES, EAGAIN, EALREADY, EBADF, ECONNRESET, EDESTADDRREQ, EFAULT, EINTR, EINVAL, EISCONN,
             EMSGSIZE, ENOBUFS, ENOMEM, ENOTCONN, ENOTSOCK, EOPNOTSUPP, EPIPE],
    "sendmsg": [-1, -1000, EACCES, EAGAIN, EALREADY, EBADF, ECONNRESET, EDESTADDRREQ, EFAULT, EINTR, EINVAL, EISCONN,
                EMSGSIZE, ENOBUFS, ENOMEM, ENOTCONN, ENOTSOCK, EOPNOTSUPP, EPIPE],
    "recvmsg": [EAGAIN, EBADF, ECONNREFUSED, EFAULT, EINTR, EINVAL, ENOMEM, ENOTCONN, ENOTSOCK],
    "recvmmsg": [-1, EAGAIN, EBADF, ECONNREFUSED, EFAULT, EINTR, EINVAL, ENOMEM, ENOTCONN, ENOTSOCK],
    "sendmmsg": [-1, *SENDTO],
    "sendfile": [-1, -1000, EAGAIN, EBADF, ECONNRESET, EFAULT, EINTR, EINVAL, EIO, ENOBUFS, ENOMEM, EOVERFLOW, EPIPE,
                 ESPIPE],
    "pread": [-1, -1000, EBADF, EFAULT, EINTR, EINVAL, EIO, EISDIR, ESPIPE],
    "shutdown": [EBADF, EINVAL, ENOTCONN, ENOTSOCK],
    "setsockopt": [EBADF, EFAULT, EINVAL, ENOPROTOOPT, ENOTSOCK],
    "getsockopt": [EBADF, EFAULT, EINVAL, ENOPROTOOPT, ENOTSOCK],
    "ioctl": [EBADF, EFAULT, EINVAL, ENOTTY],
    "fcntl": [EBADF, EINVAL, EMFILE, EPERM],
    "close": [EBADF, EDQUOT, EINTR, EIO, ENOSPC],
    "malloc": [ENOMEM],
    "realloc": [ENOMEM],
}  # fmt: skip
# What the fallback core calls in the place of epoll, recvmmsg and sendmmsg, through Python's modules.
FAULTS_OF_FALLBACK = {
    "poll": [EFAULT, EINTR, EINVAL, ENOMEM],
    "select": [EBADF, EINTR, EINVAL, ENOMEM],
    "recvfrom": [EAGAIN, EBADF, ECONNREFUSED, EFAULT, EINTR, EINVAL, ENOMEM, ENOTCONN, ENOTSOCK],
    "sendto": SENDTO,
}
# What Python's sockets call for what is plain Python in both cores: connecting, and making sockets.
FAULTS_OF_SOCKETS = {
    "socket": [EACCES, EAFNOSUPPORT, EINVAL, EMFILE, ENFILE, ENOBUFS, ENOMEM, EPROTONOSUPPORT],
    "bind": [EACCES, EADDRINUSE, EADDRNOTAVAIL, EBADF, EFAULT, EINVAL, ENOMEM, ENOTSOCK],
    "listen": [EADDRINUSE, EBADF, ENOTSOCK, EOPNOTSUPP],
    "connect": [EACCES, EADDRINUSE, EADDRNOTAVAIL, EAFNOSUPPORT, EAGAIN, EALREADY, EBADF, ECONNREFUSED, EFAULT,
                EINPROGRESS, EINTR, EISCONN, ENETUNREACH, ENOTSOCK, EPERM, ETIMEDOUT],
    # Not EBADF or ENOTSOCK: they make accept and socketpair of Python's socket module leak a descriptor.
    "getsockname": [EFAULT, EINVAL, ENOBUFS],
    "getpeername": [EBADF, EFAULT, EINVAL, ENOBUFS, ENOTCONN, ENOTSOCK],
}  # fmt: skip
# The codes of SSL_get_error that are failures. Not WANT_READ and ZERO_RETURN of a read: they say what the peer did.
SSL_ERRORS = [ssl.SSL_ERROR_SSL, ssl.SSL_ERROR_WANT_WRITE, ssl.SSL_ERROR_WANT_X509_LOOKUP, ssl.SSL_ERROR_SYSCALL]
FAULTS_OF_OPENSSL: dict[str, list[int]] = {
    "SSL_read": SSL_ERRORS,
    "SSL_write": [*SSL_ERRORS, ssl.SSL_ERROR_WANT_READ, ssl.SSL_ERROR_ZERO_RETURN],
    "SSL_shutdown": [*SSL_ERRORS, ssl.SSL_ERROR_WANT_READ],
    "BIO_write": [ssl.SSL_ERROR_SSL],
}
PYTHON = {"python": [ENOMEM]}  # an allocation of Python's, by whatever the core calls

PATTERN = b"".join(struct.pack(">I", i) for i in range(12_000))
FILE = PATTERN * 2  # more than a part of a file that is read at once
LINES = b"".join(b"%d %s\n" % (i, b"-" * (4000 if i % 5 == 4 else 10)) for i in range(12))
DATAGRAMS = 12  # of each sender
TLS_SAYS = 3000  # bytes
AUTHORITY = trustme.CA()
TLS_SERVER, TLS_CLIENT = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
AUTHORITY.issue_cert("localhost").configure_cert(TLS_SERVER)
AUTHORITY.configure_trust(TLS_CLIENT)
SO_TIMESTAMPING, STAMP_SENT = 37, 2 | 8 | 16


class Shim:
    """The preloaded library."""

    def __init__(self, backend: str) -> None:
        self.lib = ctypes.CDLL(None)
        self.lib.faults_arm.argtypes = [ctypes.c_int, ctypes.c_long, ctypes.c_long, ctypes.c_int]
        names = (ctypes.c_char_p * 64).in_dll(self.lib, "faults_names")
        self.names = [name.decode() for name in iter(iter(names).__next__, None)]
        self.on = ctypes.c_int.in_dll(self.lib, "faults_on")
        self.held = ctypes.c_long.in_dll(self.lib, "faults_held")
        self.injected = ctypes.c_long.in_dll(self.lib, "faults_injected")
        self.calls = (ctypes.c_long * len(self.names)).in_dll(self.lib, "faults_calls")
        self.hooked = False
        if backend == "epoll":
            self.lib.faults_range(*map(ctypes.c_size_t, code_of("/_epoll.")))

    def arm(self, name: str | None, first: int = 0, last: int = 0, code: int = 0) -> None:
        if name == "python" and not self.hooked:
            self.lib.faults_hook_python()
            self.hooked = True
        self.lib.faults_arm(-1 if name is None else self.names.index(name), first, last, code)

    @contextmanager
    def counting(self, pythons: bool = False) -> Iterator[None]:
        """Count and inject meanwhile; Python's own allocations only with `pythons`, since the interpreter does not
        survive the failure of each (3.11's zip, for one, or the start of a thread)."""
        before, self.on.value = self.on.value, 1 + pythons
        try:
            yield
        finally:
            self.on.value = before


def arm(fault: str) -> None:
    """In a program of its own, on epoll unless MUXCORE_BACKEND says another: from now on "name:errno:first:last"
    fails."""
    name, *numbers = fault.split(":")
    code, first, last = map(int, numbers)
    shim = Shim(os.environ.get("MUXCORE_BACKEND", "auto").replace("auto", "epoll"))
    shim.arm(name, first, last, code)
    shim.on.value = 1


def code_of(name: str) -> tuple[int, int]:
    """Where the code of a library is in memory."""
    with open("/proc/self/maps") as maps:  # noqa: PTH123
        [line] = [line for line in maps if name in line and "r-xp" in line]
    start, end = line.split()[0].split("-")
    return int(start, 16), int(end, 16)


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        return server.accept()[0], theirs


class PlainWire(Wire):
    """Changes nothing, so clients need no counterpart of it."""

    __slots__ = ()

    def advance(self) -> None:
        self.plain += self.received
        self.received = []
        self.opened = True

    def encrypt(self) -> None:
        data = b"" if self.given is None else bytes(self.given)
        self.output += (data,)
        self.given = None


class Client:
    """The other end of one connection: what it says, what it has to get, and what it has got."""

    def __init__(self, sock: socket.socket, role: str, says: bytes, expected: bytes, patience: int = 0) -> None:
        self.sock = sock
        sock.setblocking(False)
        self.role = role
        self.says = says
        self.expected = expected
        self.patience = patience  # turns before it reads, and before it closes
        self.got = bytearray()
        self.end = ""  # how it ended
        self.was_reset = False
        self.closes = role in ("echo", "lines", "pull", "outgoing")  # its side, when it has said everything
        self.conn: muxcore.Connection | None = None
        self.heard = 0  # how much the server has of it
        self.reported: list[Any] = []  # to the handler: "open", and each reason of on_close

    def step(self) -> None:
        if self.end:
            return
        try:
            if self.says:
                self.says = self.says[self.sock.send(self.says[:1500]) :]
            elif self.closes and self.patience < 0:
                self.closes = False
                self.sock.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            pass
        except OSError:  # a reset, which recv reports only once; what was sent before it is still to be read
            self.says, self.closes, self.was_reset = b"", False, True
        self.patience -= 1
        if self.patience < 0:
            self.read()

    def read(self) -> None:
        if self.role in ("leaver", "paused"):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.finish("left")
            return
        try:
            data = self.sock.recv(9000)
        except BlockingIOError:
            return
        except OSError:
            self.finish("reset")
            return
        self.got += data
        if not data:
            self.finish("reset" if self.was_reset else "eof")
        elif self.role == "stamped" and self.got == self.expected:
            self.patience, self.closes = 12, True  # the stamp is read meanwhile

    def finish(self, how: str) -> None:
        self.end = how
        self.sock.close()

    def check(self) -> None:
        """Each callback came exactly once; what arrived is what was sent; and no FIN follows a part of it, unless the
        handler got the reason."""
        opens, reasons = self.reported.count("open"), [reason for reason in self.reported if reason != "open"]
        no_memory = len(reasons) == 1 and isinstance(reasons[0], MemoryError)  # perhaps of the handler itself
        assert opens <= 1, f"{opens} opens"
        assert len(reasons) == opens or no_memory, f"{opens} opens and then {reasons}"
        assert self.expected.startswith(self.got), f"{bytes(self.got[:40])!r}... of {len(self.got)} was never sent"
        if self.end == "eof" and not no_memory:
            assert self.got == self.expected, f"a FIN after {len(self.got)} of {len(self.expected)} bytes: {reasons}"
        if self.end == "reset" and self.role != "abort":
            assert reasons != [None], "a reset without a reason"


class TLSClient(Client):
    """Over TLS, from the server's on_open on."""

    def __init__(self, sock: socket.socket, *args: Any) -> None:
        wrapped = TLS_CLIENT.wrap_socket(
            sock, server_hostname="localhost", do_handshake_on_connect=False, suppress_ragged_eofs=False
        )
        super().__init__(wrapped, *args)
        self.shaken = False

    def step(self) -> None:
        if self.end:
            return
        self.patience -= 1
        try:
            if not self.shaken:
                wrapped: Any = self.sock
                wrapped.do_handshake()
                self.shaken = True
            if self.says:
                self.says = self.says[self.sock.send(self.says[:500]) :]
            if self.patience < 0:
                data = self.sock.recv(9000)
                self.got += data
                if not data:
                    self.finish("eof")
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        except ssl.SSLEOFError:  # no close_notify
            self.finish("reset" if self.got != self.expected else "unsure")
        except OSError:
            self.finish("reset")


class Answerer(Client):
    """The other end of a connection that the Mux makes: it listens first."""

    def __init__(self, says: bytes) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0))
        super().__init__(self.listening, "outgoing", says, says)

    def step(self) -> None:
        if self.sock is self.listening and not self.end:
            try:
                sock = self.listening.accept()[0]
            except BlockingIOError:
                if self.reported:
                    self.finish("refused")
                return
            self.listening.close()
            self.sock = sock
            sock.setblocking(False)
        super().step()

    def check(self) -> None:
        if "open" not in self.reported:
            [reason] = self.reported
            # CPython 3.11 raises SystemError if there is no memory for the frame of a call ("without exception set").
            allowed = isinstance(reason, (OSError, MemoryError)) or "without exception set" in str(reason)
            assert allowed, f"no connection, and the reason is {reason}"
        else:
            super().check()


class Sender:
    """A peer of the datagram echo: its requests, and what has come back."""

    def __init__(self, name: bytes, address: Any) -> None:
        self.requests = [b"%s %d " % (name, i) + PATTERN[: i * 150] for i in range(DATAGRAMS)]
        self.left = list(self.requests)
        self.got: list[bytes] = []
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.connect(address)
        self.sock.setblocking(False)

    def step(self) -> None:
        """A burst at first, then one by one."""
        for _ in range(DATAGRAMS // 2 if len(self.left) == DATAGRAMS else 1):
            if self.left:
                self.sock.send(self.left.pop(0))
        try:
            while True:
                self.got.append(self.sock.recv(1 << 16))
        except BlockingIOError:
            pass

    def check(self) -> None:
        """What came back is what was sent, except for datagrams that are missing."""
        requests = iter(self.requests)
        for data in self.got:
            assert data in requests, f"{data[:20]!r}... of {len(data)} is altered, doubled, misplaced or another peer's"


class Datagrams:
    """An echo of datagrams, and its peers."""

    def __init__(self, mux: muxcore.Mux) -> None:
        self.mux = mux
        self.errors: list[BaseException] = []
        self.is_above = False
        self.datagram = mux.datagram(
            ("127.0.0.1", 0), self, limits=muxcore.Limits(overflow="drop", low=1000, high=2000)
        )
        self.senders: list[Sender] = []

    def on_datagrams(self, datagram: muxcore.Datagram, messages: list[tuple[bytes, Any]]) -> None:
        for data, address in messages:
            self.is_above = not datagram.send(data, address)

    def on_error(self, datagram: muxcore.Datagram, exc: BaseException) -> None:
        self.errors.append(exc)

    def on_drain(self, datagram: muxcore.Datagram) -> None:
        self.is_above = False

    def missing(self) -> int:
        return sum(len(sender.requests) - len(sender.got) for sender in self.senders)

    def over(self) -> bool:
        """Everything came back, or is counted. (What a MemoryError in the handler has lost is counted as its error.)"""
        stats = self.mux.stats()
        return (self.missing() <= stats.drops or stats.handler_errors > 0) and not self.is_above

    def close(self) -> None:
        for sender in self.senders:
            sender.sock.close()


class Load(muxcore.Handler):
    """Every way in which a connection lives and ends, each once."""

    def __init__(self, shim: Shim, backend: str) -> None:
        self.shim = shim
        self.backend = backend
        self.clients: dict[Any, Client] = {}  # by address
        self.raised: list[BaseException] = []
        self.pulled: dict[Any, Client] = {}  # by connection
        self.datagrams: Datagrams | None = None
        self.file = tempfile.TemporaryFile()  # noqa: SIM115
        self.file.write(FILE)
        self.file.flush()

    # -- what the server does

    def on_open(self, conn: muxcore.Connection) -> None:
        client = conn.data = self.clients[conn.peer]
        client.reported.append("open")
        if client.role == "lines":
            conn.framer = muxcore.Lines()
        elif client.role == "stream":
            self.set_option(conn, socket.SO_SNDBUF, 4096)
            conn.write(PATTERN[:40_000])
            conn.write_eof()
        elif client.role == "wired":
            conn.start_tls(PlainWire())  # type: ignore[arg-type]  # see main()
        elif client.role == "tls":
            conn.start_tls(TLS_SERVER)
        elif client.role == "stamped" and self.backend != "select":
            self.set_option(conn, SO_TIMESTAMPING, STAMP_SENT)

    def set_option(self, conn: muxcore.Connection, name: int, value: int) -> None:
        """A failure here would be the handler's, not the core's."""
        before, self.shim.on.value = self.shim.on.value, 0
        conn.setsockopt(socket.SOL_SOCKET, name, value)
        self.shim.on.value = before

    def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
        getattr(self, conn.data.role)(conn, message)

    def on_close(self, conn: muxcore.Connection, exc: BaseException | None) -> None:
        self.clients[conn.peer].reported.append(exc)

    def echo(self, conn: muxcore.Connection, message: bytes) -> None:
        conn.send(message)

    lines = stamped = outgoing = echo

    def sends_file(self, conn: muxcore.Connection, message: bytes) -> None:
        self.set_option(conn, socket.SO_SNDBUF, 4096)
        conn.send(b"head")
        try:
            conn.sendfile(self.file, 0, 80_000)
        except OSError:  # no descriptor for it: sendfile raises, and the handler sends nothing more
            said = conn.data.expected
            conn.data.expected = said[: said.index(b"head") + 4]
        else:
            conn.send(b"tail")
            conn.send(bytes(2000))
        conn.close()

    wired = sends_file

    def tls(self, conn: muxcore.Connection, message: bytes) -> None:
        conn.send(message)
        conn.data.heard += len(message)
        if conn.data.heard == TLS_SAYS:
            self.sends_file(conn, message)

    def abort(self, conn: muxcore.Connection, message: bytes) -> None:
        conn.abort()

    def leaver(self, conn: muxcore.Connection, message: bytes) -> None:
        self.set_option(conn, socket.SO_SNDBUF, 4096)
        conn.send(PATTERN)
        conn.send(PATTERN)

    def paused(self, conn: muxcore.Connection, message: bytes) -> None:
        conn.data.conn = conn
        conn.pause_reading()

    def threaded(self, conn: muxcore.Connection, message: bytes) -> None:
        with self.shim.counting():
            for method, argument in ((conn.send, (b"from a thread",)), (conn.close, ())):
                thread = threading.Thread(target=method, args=argument)
                thread.start()
                thread.join()

    # -- the run

    def connect(self, role: str, says: bytes, expected: bytes, patience: int = 0) -> None:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        sock.connect(self.listener.address)
        kind, name = TLSClient if role == "tls" else Client, sock.getsockname()
        self.clients[name] = kind(sock, role, says, expected, patience)

    def run(self) -> None:
        """Raises AssertionError if something is wrong, OSError or MemoryError if the Mux cannot even be made."""
        try:
            with self.shim.counting():
                self.mux = muxcore.Mux(backend=self.backend, read_size=4096)
            try:
                self.serve()
            finally:
                self.mux.close()
            for client in self.clients.values():
                client.check()
            for sender in self.datagrams.senders:
                sender.check()
            self.raised += self.datagrams.errors
        finally:
            self.file.close()
            if self.datagrams is not None:
                self.datagrams.close()
            for client in self.clients.values():
                client.sock.close()

    def serve(self) -> None:
        with self.shim.counting():
            if self.backend == "epoll":
                self.mux.fileno()
            self.listener = self.mux.listen(
                ("127.0.0.1", 0), self, max_connections=6, timeouts=muxcore.Timeouts(linger=0.05)
            )
            self.datagrams = Datagrams(self.mux)
            self.mux.call_later(0.001, int)
        for name in (b"one", b"two"):
            self.datagrams.senders.append(Sender(name, self.datagrams.datagram.address))
        answerer = Answerer(PATTERN[:3000])
        self.clients[answerer.sock.getsockname()] = answerer
        with self.shim.counting():
            self.mux.connect(answerer.sock.getsockname(), self)
        self.connect("echo", PATTERN[:5000], PATTERN[:5000])
        self.connect("lines", LINES, LINES)
        self.connect("sends_file", b"go", b"head" + FILE[:80_000] + b"tail" + bytes(2000), patience=3)
        self.connect("wired", b"go", b"head" + FILE[:80_000] + b"tail" + bytes(2000), patience=3)
        says = PATTERN[:TLS_SAYS]
        self.connect("tls", says, says + b"head" + FILE[:80_000] + b"tail" + bytes(2000), patience=3)
        self.connect("stream", b"", PATTERN[:40_000], patience=3)
        self.connect("abort", b"x", b"")
        self.connect("leaver", b"x", PATTERN + PATTERN, patience=4)
        self.connect("paused", b"x", b"", patience=4)
        self.connect("stamped", b"stamped", b"stamped")
        self.connect("threaded", b"x", b"from a thread")
        ours, theirs = tcp_pair()
        self.clients["pull"] = client = Client(theirs, "pull", PATTERN[:3000], PATTERN[:3000])
        try:
            with self.shim.counting():
                self.pulled[self.mux.attach(ours)] = client
        except BaseException:
            ours.close()
            raise
        self.turn_until_over()

    def turn_until_over(self) -> None:
        deadline = time.monotonic() + 5
        while not self.over():
            if time.monotonic() > deadline:
                stuck = [(client.role, len(client.got)) for client in self.clients.values() if not client.end]
                state = f"{self.datagrams.missing()} datagrams missing, {self.datagrams.errors}, {self.mux.stats()}"
                raise AssertionError(f"stuck: {stuck}, {list(self.mux.connections)}, {state}")
            try:
                with self.shim.counting(pythons=True):
                    events = self.mux.poll(0.0005)
                with self.shim.counting():
                    self.pull(events)
            except (OSError, MemoryError) as error:
                self.raised.append(error)
            for sender in self.datagrams.senders:
                sender.step()
            for client in self.clients.values():
                client.step()
                if self.backend == "select" and client.end == "left" and client.conn is not None:
                    client.conn.resume_reading()  # select reports no reset while reading is paused
        with self.shim.counting():
            self.pull(self.mux.poll(0.0005))  # a report that had no memory is made again

    def over(self) -> bool:
        ended = all(client.end for client in self.clients.values()) and not len(self.mux.connections)
        return ended and self.datagrams.over()

    def sent(self, conn: muxcore.Connection, message: bytes) -> bool:
        try:
            conn.send(message)
        except MemoryError:
            return False
        return True

    def pull(self, events: list[tuple[Any, int]]) -> None:
        for conn, flags in events:
            client = self.pulled[conn]
            client.reported += ["open"] * (flags & muxcore.OPENED != 0)
            for message in conn:
                while not self.sent(conn, message):
                    pass
            if flags & muxcore.CLOSED:
                client.reported.append(conn.error)


def injected(shim: Shim, backend: str, name: str | None, nth: int, span: int, code: int) -> str | None:
    """Run the load with a fault in the n-th call, and those that follow it: what is wrong, or None."""
    descriptors, held = len(os.listdir("/proc/self/fd")), shim.held.value  # noqa: PTH208
    shim.arm(name, nth, nth + span - 1, code)
    wrong = outcome(Load(shim, backend), code)
    gc.collect()
    if wrong is None and len(os.listdir("/proc/self/fd")) != descriptors:  # noqa: PTH208
        wrong = "a descriptor leaked"
    if wrong is None and backend == "epoll" and shim.held.value != held:
        wrong = f"{shim.held.value - held} pieces of memory leaked"
    return wrong


def outcome(load: Load, code: int) -> str | None:
    try:
        load.run()
    except (OSError, MemoryError) as error:
        load.raised.append(error)
    except BaseException:
        return traceback.format_exc()
    for error in load.raised:
        if code != (ENOMEM if isinstance(error, MemoryError) else getattr(error, "errno", None)):
            return "".join(traceback.format_exception(error))
    return None


def main(backend: str, stride: str, span: str, *names: str) -> None:
    logging.getLogger("muxcore").addHandler(logging.NullHandler())
    logging.getLogger("muxcore").propagate = False
    shim = Shim(backend)
    for core in (muxcore._fallback.wire, sys.modules.get("muxcore._epoll")):
        if core is not None:
            tls_wire = core.tls_wire  # type: ignore[attr-defined]
            core.tls_wire = lambda wire, *args, make=tls_wire: wire if isinstance(wire, Wire) else make(wire, *args)  # type: ignore[attr-defined]
    for _ in range(3):
        what = injected(shim, backend, None, 0, 0, 0)
        assert what is None, what
    calls = dict(zip(shim.names, shim.calls, strict=True))
    runs, faults, wrong = 0, 0, []
    for name in names:
        for code in (FAULTS | FAULTS_OF_FALLBACK | FAULTS_OF_SOCKETS | FAULTS_OF_OPENSSL | PYTHON)[name]:
            nth = 1
            while True:
                what = injected(shim, backend, name, nth, int(span), code)
                runs += 1
                faults += shim.injected.value
                if what is not None:
                    wrong.append(f"{name} {nth} {errno.errorcode.get(code, code)}: {what}")
                if not shim.injected.value or len(wrong) > 20:
                    break
                nth += int(stride)
    print(json.dumps({"calls": calls, "runs": runs, "faults": faults, "wrong": wrong}))


if __name__ == "__main__":
    main(*sys.argv[1:])
