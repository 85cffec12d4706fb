"""What may live here: the wire of a connection: what stands between its socket and its framer.

The outbox of such a connection is two queues: `_plain` is for the wire, `_out` for the socket, as ever. What the wire
makes of the plaintext is counted like anything else.
"""

from __future__ import annotations

import socket
from collections import deque

from .._custom import CustomReader
from .._frame import as_bytes
from .._timers import own_step
from .._typing import TYPE_CHECKING
from .._wire import Wire, check_is_its_own
from .._wiring import tls_wire
from ..errors import ConnectionClosed, HandshakeTimeout, OutboxFull, about, from_call, without_frames
from .inbox import Inbox
from .outbox import FILE_BURST, FilePart
from .pollers import OPENED

if TYPE_CHECKING:
    import ssl
    from typing import Any

    from .._wire import Wire
    from ..proxy_protocol import Proxy

GATHERED = 1 << 16  # bytes of small pieces of the outbox that a wire gets at once
LARGEST_GIVEN = 1 << 18  # and of a large one


class Wires(Inbox):
    """The part of a connection that has a wire."""

    __slots__ = ()

    def start_tls(
        self, context: ssl.SSLContext, *, server_side: bool | None = None, server_hostname: str | None = None
    ) -> None:
        self.mux._check_thread()
        self._check_is_plain()
        policy = self._policy
        side = None if policy.listener is None and not policy.outbound else not policy.outbound
        wire = tls_wire(context, server_side, server_hostname, side)
        self._check_is_plain()  # the context may be of a class of the user's
        if self._reader is not None and self._reader.feeding:
            raise RuntimeError("start_tls: the framer's feed() is running")  # it may hold what belongs to TLS
        self._begin_wire(wire, True)

    def _check_is_plain(self) -> None:
        if self._closing or self._ended or self._connecting or self.eof or self._write_eof:
            raise ConnectionClosed("start_tls: the connection is not open", conn=self)
        if self._wire is not None:
            raise RuntimeError("start_tls: the connection has TLS already")

    @property
    def tls(self) -> ssl.SSLObject | None:
        self.mux._check_thread()
        return None if self._wire is None else self._wire.tls

    @property
    def proxy(self) -> Proxy | None:
        self.mux._check_thread()
        return self._proxy

    # -- how it begins

    def _make_wire(self) -> None:
        """A new connection begins with a handshake; `_handshake` is set since it was made."""
        self._schedule()
        failure = wire = None
        try:
            wire = self._policy.wiring.make(self.peer)
        except Exception as error:
            failure = error
        self.mux._check_fork()
        if self._wire is not None or self._ended:
            return
        if wire is not None:
            self._begin_wire(wire, False)
            return
        self._abort(failure)

    def _begin_wire(self, wire: Wire, in_the_stream: bool) -> None:
        """From now on the socket's bytes are the wire's: those that were received already, and not delivered, too.
        in_the_stream: what is queued already goes out as it is."""
        formers = []
        while (reader := self._reader) is not None:
            if self._custom is None:
                rest = as_bytes(reader.rest())
                if self._reader is not reader:
                    continue
            else:
                former, rest = self._change_framer(self._policy.framer)  # another one, which has got nothing yet
                formers.append(former)
                reader = self._reader
                if not isinstance(reader, CustomReader) or reader.found or reader.data != rest:
                    continue  # there was nothing, or a signal handler has received meanwhile
                reader.data = b""
            self._reader = None
            wire.received += (rest,)
        self._schedule()
        if self._ended or self._wire is not None:
            return
        first: deque[Any] = deque()
        second: deque[Any] = deque()
        if in_the_stream:
            self._plain = second
        else:
            self._plain, self._out = self._out, first
        self._wire_shut = False
        self._wire, self._due, self._handshake = wire, wire.speaks_first or bool(wire.received), True
        for former in formers:
            if former is not None:
                former.forget()  # may run finalizers

    def _queue_handshake(self) -> None:
        if not self._handshaking:
            self.mux._handshakes.append(self)
            self._handshaking = True

    def _run_pending_handshake(self) -> None:
        """As _run_pending, before the wire is open: only the end can come."""
        if self._wire is None and not self._ended:
            self._make_wire()
        if self._wire is not None and self._due:
            self._queue_handshake()
        limit_ns = self._handshake_limit()
        if self._deadline is None and limit_ns and not self._ended and (not self._closing or self._has_output()):
            self._set_handshake_due(self.mux._now_ns + limit_ns)
        self._send_out()
        if self._peer_gone and not self._ended:
            self._read_what_is_left()
        if not self._ended:
            self._advance_close()
        if self._ended:
            self._finish()
        else:
            self._apply_interest()

    def _is_newcomer(self) -> bool:
        return self._handshake and not self._reported & OPENED and self._policy.listener is not None

    def _handshake_limit(self) -> int:
        limit_ns, own = self._policy.handshake_ns, 0 if self._wire is None else self._wire.limit_ns
        return min(limit_ns, own) if limit_ns and own else limit_ns or own

    def _set_handshake_due(self, due: int) -> None:
        self._deadline = self.mux._add_timer(due, self._handshake_due, (due,))

    @own_step
    def _handshake_due(self, due: int) -> None:
        self._deadline = None
        if self._ended or not self._handshake:
            self._schedule()
            return
        if not self.mux._has_judged(due):
            self._set_handshake_due(due)
            return
        limit, step = self._handshake_limit() / 1e9, Wire.step if self._wire is None else self._wire.step
        self.mux._n.timeouts += 1
        self._abort(HandshakeTimeout(f"the {step} took longer than {limit:g} s", conn=self, limit=limit))

    def _set_open(self) -> None:
        """The wire is open, and so is the connection."""
        self._schedule()
        self._drop_deadline()
        self._received_ns = self.mux._now_ns
        if not self._policy.outbound and not isinstance(self.peer, str):
            self._acknowledge()
        self._handshake = False

    def _acknowledge(self) -> None:
        """A server of TLS 1.3 may have nothing to send now, and the kernel delays its ACK for 40 ms. A client with
        Nagle's algorithm would wait for that with its first message."""
        if self._sock is not None and hasattr(socket, "TCP_QUICKACK"):
            try:
                self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            except OSError as error:
                if not from_call(error):
                    raise

    # -- input

    def _discards_input(self) -> bool:
        """Whether input is dropped: behind the end of the stream, and while closing, unless output waits for the
        handshake."""
        if self.eof or (self._closing and self._wire_shut):
            return True
        return self._closing and not (self._handshake and self._has_output())

    def _give_wire(self, wire: Wire) -> None:
        """What was just read."""
        read, received = self.mux._read, wire.received
        if self._discards_input():
            read.clear()
            return
        self._due = True
        if read:
            received += (read[0],)
            del read[0]
        if self._handshake:
            self._queue_handshake()
        else:
            self._run_wire()

    def _run_wire(self) -> None:
        """Let the wire work through what was received, and go on with what it makes of it."""
        wire = self._wire
        if wire is None or self._busy or not self._due:
            return
        if self._wire_failure is None:
            self._busy = True
            size = sum(map(len, wire.received))
            try:
                wire.advance()
            except Exception as error:
                check_is_its_own(wire, error)
                self._keep_failure(error)
            finally:
                self._busy = False
            if size:
                self._fruitful = 2 * sum(map(len, wire.plain)) >= size
            self.mux._check_fork()
        if not self._ended and self._wire is wire:
            self._go_on(wire)

    def _keep_failure(self, error: Exception) -> None:
        self._wire_failure = error
        self._schedule()
        without_frames(error)

    def _go_on(self, wire: Wire) -> None:
        """The wire has worked, and may have failed in the end. It stays due until all that came of it is dealt with: an
        interrupt may come."""
        self._take_output(wire)
        if wire.proxy is not None:
            self._set_proxy(wire.proxy)
        if wire.opened and self._handshake:
            self._set_open()  # then on_open may come
        if self._handshake and self._wire_failure is not None:
            self._handshake_failed()
            return
        if not wire.over and not self._reported & OPENED and not self._handshake:
            self._schedule()  # on_open goes first
            return
        self._keep_plain(wire)
        if self._ended or self._wire is not wire:
            return
        if wire.over:
            self._replace_wire(wire)
            return
        if self._wire_failure is not None:
            self._stream_failed()
            return
        if wire.ended and not self.eof:
            self._fin_unread = True
            self._set_eof()
        self._due = False
        self._send_out()
        self._look_at_bounds()

    def _look_at_bounds(self) -> None:
        """What a wire sends for itself (replies to changes of keys, say) counts as any output: a peer that causes it
        and reads nothing is not read from any more, and is given up in the end."""
        limits = self._policy.limits
        if self._out_bytes <= limits.high or self._closing or self._ended:
            return
        if self._held() >= limits.max_outbox + limits.high:
            limit = limits.max_outbox
            text = f"outbox holds {self._held()} bytes, max_outbox is {limit}"
            self._abort(OutboxFull(text, conn=self, limit=limit))
        elif not self._is_above_high:
            self._schedule()
            self._is_above_high = True
            self._drain_owed = False
            self.mux._n.high_water_hits += 1

    def _set_proxy(self, proxy: Proxy) -> None:
        if proxy.source is not None:
            self.peer = proxy.source
        self._proxy = proxy

    def _replace_wire(self, wire: Wire) -> None:
        """A wire that had only the beginning of the stream to do with is done: the next one follows, or none."""
        self._schedule()
        self._drop_deadline()  # the successor has its own
        if wire.successor is not None:
            self._wire = wire.successor
            self._queue_handshake()
            return
        assert self._plain is not None
        self._out += self._plain
        self._wire = self._plain = None

    def _keep_plain(self, wire: Wire) -> None:
        """Deliver what the wire has decrypted, or keep it."""
        while wire.plain and not self.mux._close_requested:
            if len(wire.plain) > 1:
                wire.plain[:] = [b"".join(wire.plain)]
            if not wire.plain[0]:
                del wire.plain[0]
            elif self._reported & OPENED:
                self._accept_input(wire.plain)
            else:  # of a PROXY header: _run_pending goes on
                self._make_custom()
                self._feed(wire.plain)
                self._report_complete()

    def _wire_eof(self, wire: Wire) -> None:
        """The peer's FIN was read."""
        self._fin_unread = False
        if self.eof or (self._closing and not self._handshake):
            self._set_eof()
            return
        try:
            self._wire_failure = wire.eof()
        except Exception as error:
            check_is_its_own(wire, error)
            self._keep_failure(error)
        self.mux._check_fork()
        if self._ended or self._wire is not wire:
            return
        if self._handshake:
            self.eof = True
            self._handshake_failed()
            return
        if self._wire_failure is not None:
            self._keep_error(self._wire_failure)
        self._set_eof()

    def _handshake_failed(self) -> None:
        """It was never open. The wire may have a last word for the peer; plaintext is not sent."""
        error = self._wire_failure
        self._schedule()
        self._keep_error(error)
        self._close()
        self._wire_shut = True
        self._discard_plaintext()
        self._due = False
        if error is not None:
            about(error, self)
        self._send_out()

    def _stream_failed(self) -> None:
        """The wire cannot go on: the stream has ended here, in both directions. What came before is delivered first."""
        error = self._wire_failure
        self._schedule()
        self._keep_error(error)
        self._wire_shut = self._write_eof = True
        self._discard_plaintext()
        if not self.eof:
            self._fin_unread = True
            self._set_eof()
        self._due = False
        if error is not None:
            about(error, self)
        self._send_out()

    # -- output

    def _flush_wire(self) -> None:
        """As _flush; and like a file, a long output leaves the others their turn."""
        if self._flushing:
            return  # see _flush()
        enough = self.mux._n.bytes_out + FILE_BURST
        while self._wire is not None and (self._can_flush() or self._encrypt_more(self._wire)):
            if not self._can_flush():
                return
            self._flush()
            if self.mux._n.bytes_out > enough and self._has_output() and not self._ended:
                self._wait_writable()
        self._look_for_drain()

    def _encrypt_more(self, wire: Wire) -> bool:
        """Let the wire work on plaintext of the outbox; whether there is something for the socket now."""
        if self._busy or self._out or self._sent:
            return False
        failed = self._due and self._wire_failure is not None
        if self._handshake or self._wire_shut or wire.over or failed or not self._plain:
            self._take_output(wire)  # there is some if an interrupt came before
            return bool(self._out)
        self._busy = True  # until it is encrypted and removed: a signal handler that flushes would encrypt it, too
        try:
            failure = self._encrypt(wire)
        finally:
            self._busy = False
        if self._ended or self._wire is not wire:
            return False
        self._take_output(wire)
        if failure is not None:
            self._wire_failure = failure
            self._stream_failed()
        return bool(self._out)

    def _encrypt(self, wire: Wire) -> Exception | None:
        """Encrypt what is at the front of the plaintext, and remove it. Returns why the wire cannot go on."""
        if not self._given:  # else an interrupt came amid this
            data = self._gathered()
            size = len(data)
            if not size or self._ended or not self._plain:
                return None
            wire.given, self._given = data, size
        failure = None
        try:
            wire.encrypt()
        except Exception as error:
            check_is_its_own(wire, error)
            failure = without_frames(error)
        self.mux._check_fork()
        if failure is None and not self._ended and self._wire is wire:
            self._consume_plaintext()
        self._given = 0
        return failure

    def _gathered(self) -> bytes | memoryview:
        """Plaintext from the front of the outbox: a large piece, a part of a file, or small pieces together."""
        plain = self._plain or ()
        pieces: list[Any] = []
        total = 0
        for part in list(plain):
            if isinstance(part, FilePart):
                return b"".join(pieces) or self._read_file(part)
            if not pieces and len(part) >= GATHERED:
                return memoryview(part)[:LARGEST_GIVEN]
            pieces.append(part)
            total += len(part)
            if total >= GATHERED:
                break
        return b"".join(pieces)[:GATHERED]

    def _read_file(self, part: FilePart) -> bytes:
        try:
            data = part.read(min(part.left, GATHERED))
        except OSError as error:
            if not from_call(error):
                raise
            self._abort(error)
            return b""
        if not data:
            self._abort(OSError(f"sendfile: the file ended {part.left} bytes before the end of the queued part"))
        return data

    def _consume_plaintext(self) -> None:
        """Remove what is encrypted. No step has a call within it, as in _consume."""
        plain = self._plain
        while self._given and plain:
            first, given = plain[0], self._given
            length = len(first)
            part = first if isinstance(first, FilePart) else None
            taken = min(given, length)
            rest = memoryview(first)[taken:] if part is None and taken < length else None
            if not plain or plain[0] is not first:
                continue  # a signal handler has ended it
            if part is not None:
                part.offset += taken
                part.left -= taken
                self._file_bytes -= taken
            if rest is not None:
                plain[0] = rest
            elif taken == length:
                del plain[0]
                self._files -= part is not None
            self._out_bytes -= taken
            self._given -= taken

    def _take_output(self, wire: Wire) -> None:
        """What the wire has for the socket. Behind the end of our side nothing is sent: a reply to a change of keys,
        say, is dropped."""
        if self._wire_shut:
            wire.output.clear()
        while wire.output:
            data = wire.output[0]
            size = len(data)
            if wire.output and wire.output[0] is data:
                self._out += (data,)
                self._out_bytes += size
                del wire.output[0]

    def _discard_plaintext(self) -> None:
        """What can be encrypted no more."""
        nothing: deque[Any] = deque()
        if self._plain:
            self.mux._n.unsent += 1
            size = sum(map(len, self._plain))
            files = sum(len(part) for part in self._plain if isinstance(part, FilePart))
            self._plain, self._given = nothing, 0
            self._out_bytes -= size
            self._file_bytes -= files

    # -- the end

    def _shut_wire(self, wire: Wire) -> None:
        """All is sent: let the wire end our side of the stream, before the socket does."""
        self._schedule()
        try:
            wire.finish()
        except Exception as error:
            check_is_its_own(wire, error)
            without_frames(error)  # the peer will see a stream without an end
        self.mux._check_fork()
        if not self._ended and self._wire is wire:
            self._take_output(wire)
            self._wire_shut = True

    def _forget_wire(self) -> None:
        self._wire = None

