"""What may live here: TLS as a wire, over the public part of Python's ssl: OpenSSL does all of the cryptography."""

from __future__ import annotations

import _ssl
import ssl

from ._typing import TYPE_CHECKING
from ._wire import Wire

if TYPE_CHECKING:
    from typing import Any

HEADER = 5  # bytes of a record's header: type, version, and two bytes of length
LARGEST = 1 << 14  # plaintext of one record
# Of the class in C: a user's subclass may have its own.
CALLBACK: Any = vars(_ssl._SSLContext)["_msg_callback"]
OPTIONS: Any = vars(_ssl._SSLContext)["options"]


class TLSWire(Wire):
    """TLS for one connection.

    OpenSSL gets whole records, whose lengths are read here: so it never finds half of one, for which Python's ssl would
    raise SSLWantReadError, at the price of a small record's decryption.

    A call whose result must not be lost to an interrupt is made by `list += map(...)`, in C from end to end. But reads
    and writes of Python's ssl themselves run signal handlers, after OpenSSL's part. A write was one record, or nothing.
    Of a read that was interrupted there, nothing is known: then the stream has a hole, and ends with an error.
    """

    __slots__ = (
        "_fed", "_hole", "_incoming", "_outgoing", "_partial", "_pending", "_read", "_tickets", "_write",
        "speaks_first", "tls",
    )

    tls: ssl.SSLObject
    speaks_first: bool
    given: bytes | memoryview | None
    opened: bool
    ended: bool

    def __init__(self, context: ssl.SSLContext, server_side: bool, server_hostname: str | None) -> None:
        super().__init__()
        self.speaks_first = not server_side
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_side, server_hostname)
        # The methods of SSLObject are Python's, in which an interrupt could come between a result and our list.
        inner: Any = getattr(self.tls, "_sslobj", self.tls)
        self._read, self._write, self._pending = inner.read, inner.write, inner.pending
        self._partial = b""  # the beginning of a record
        self._fed: list[int] = []  # that what is first in _partial or received was given to OpenSSL
        self._hole = False
        # Bytes of a server's tickets, which leave with its first output: a client that writes and closes without a read
        # would reset the connection because of them, and lose what it has written.
        self._tickets = 0

    def advance(self) -> None:
        outgoing = self._outgoing
        try:
            if self.received:
                self._feed()
            if self.opened or self._shake_hands():
                self._decrypt()
        except BaseException:
            self._tickets = 0  # an alert is behind them
            self._collect()
            raise
        if outgoing.pending > self._tickets:
            self._collect()

    def _shake_hands(self) -> bool:
        try:
            self.tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        if self.tls.server_side and self.tls.version() == "TLSv1.3":
            self._tickets = self._outgoing.pending
        self.opened = True
        return True

    def _feed(self) -> None:
        """Give OpenSSL the whole records of what was received."""
        received, fed = self.received, self._fed
        while received:
            data = self._partial + received[0] if self._partial else received[0]
            size = len(data)
            whole = size if size > HEADER and data[3] << 8 | data[4] == size - HEADER else end_of_records(data)
            if whole and not fed:
                fed += map(self._incoming.write, (data if whole == size else memoryview(data)[:whole],))
            self._partial = data[whole:] if whole != size else b""
            del received[0], fed[:]

    def _decrypt(self) -> None:
        read, plain, incoming = self._read, self.plain, self._incoming
        # Each read gets all of a record, and OpenSSL reads none ahead: it has plaintext for us only if we have records,
        # or if the compiled core has read a part of one.
        while (left := incoming.pending or self._pending()) and not self.ended:
            if self._hole:
                raise ssl.SSLError(ssl.SSL_ERROR_SSL, "a signal handler raised during a read; its result is lost")
            try:
                plain += map(read, (left if left < LARGEST else LARGEST,))
            except ssl.SSLWantReadError:  # it was a ticket, say, or a change of keys
                continue
            except ssl.SSLZeroReturnError:  # close_notify, when ours has been sent
                self.ended = True
                return
            except BaseException:
                self._hole = incoming.pending != left
                raise
            if not plain[-1]:  # close_notify
                self.ended = True

    def encrypt(self) -> None:
        outgoing, output = self._outgoing, self.output
        self._tickets = 0
        while (given := self.given) is not None:
            piece, rest = given, None
            if len(given) > LARGEST:
                piece, rest = given[:LARGEST], given[LARGEST:]
            before = outgoing.pending
            try:
                self._write(piece)
            except BaseException:
                if outgoing.pending != before:  # it was written
                    self.given = rest
                raise
            self.given = rest
        output += map(outgoing.read, (-1,))

    def _collect(self) -> None:
        outgoing, output = self._outgoing, self.output
        if outgoing.pending:
            output += map(outgoing.read, (-1,))

    def parts(self) -> tuple[Any, Any, Any, Any] | None:
        """CPython's objects that have OpenSSL's pointers: SSL, context, BIOs. None while something is underway here, or
        if OpenSSL might call Python. No code of a user's class runs."""
        owner: Any = self.tls._sslobj if type(self.tls) is ssl.SSLObject else None  # type: ignore[attr-defined]
        busy = self.received or self.plain or self.output or self._fed or self._hole or self.ended or not self.opened
        if busy or type(owner).__module__ != "_ssl":
            return None
        context = owner.context  # a user's class may have chosen another than the one that was given
        # Whether OpenSSL calls Python after the handshake: for each record, or for another handshake (up to TLS 1.2).
        if CALLBACK.__get__(context) is not None:
            return None
        if not OPTIONS.__get__(context) & ssl.OP_NO_RENEGOTIATION and owner.version() != "TLSv1.3":
            return None
        return owner, context, self._incoming, self._outgoing

    def fail(self) -> None:
        """Raise what OpenSSL has noted when the compiled core called it. (It fails again, without a note.)"""
        plain = self.plain
        plain += map(self._read, (1,))

    def finish(self) -> None:
        """close_notify. That of the peer is not waited for."""
        self._tickets = 0
        try:
            self.tls.unwrap()
        except ssl.SSLError:
            pass
        finally:
            self._collect()

    def eof(self) -> Exception | None:
        if self.ended:
            return None
        what = "sent no close_notify" if self.opened else "closed the connection amid the handshake"
        error = ssl.SSLEOFError(int(ssl.SSL_ERROR_EOF), f"the peer {what}")
        error.library, error.reason = "SSL", "UNEXPECTED_EOF_WHILE_READING"  # as OpenSSL names it
        return error


def end_of_records(data: bytes) -> int:
    """Where the last whole record ends. What is no record is OpenSSL's to refuse: it gets all of it."""
    at, size = 0, len(data)
    while size - at >= HEADER:
        length = data[at + 3] << 8 | data[at + 4]
        if data[at + 1] != 3 or length > LARGEST + 2048:
            return size
        if at + HEADER + length > size:
            break
        at += HEADER + length
    return at
