"""What may live here: the outbox: queueing, flushing, files, what happens when it is full."""

from __future__ import annotations

import os
import sys
import time
from _thread import get_ident
from itertools import islice, takewhile

from .._file import FILES_KEPT, file_part, read_at
from .._frame import SCANS, as_bytes, encode
from .._timers import own_step
from .._typing import TYPE_CHECKING
from ..errors import OutboxFull, from_call
from .state import ConnectionState
from .syscalls import PEER_GONE, SEND_FLAGS, TRY_LATER, discard_error_queue, send_file

try:
    import fcntl
    import termios
except ImportError:  # not Unix: no call reports what is unsent
    pass

if TYPE_CHECKING:
    import socket
    from collections import deque
    from collections.abc import Callable, Iterable
    from typing import Any

MAX_PARTS = 64
SMALL_PIECE, BLOCK_SIZE = 1024, 4096
FILE_PIECE = 65536  # bytes of a file to read at once where there is no sendfile
FILE_BURST = 1 << 20  # bytes of a file for one connection before the others have their turn
STARVED_NS = 10_000_000
FOREIGN_COST = 192


class FilePart:
    """A part of a file in an outbox, and a descriptor of our own for it."""

    __slots__ = ("_own", "left", "offset")

    def __init__(self, fd: int, offset: int, size: int) -> None:
        self.offset = offset
        self.left = size
        self._own: list[int] = []
        self._own.extend(map(os.dup, (fd,)))  # in one step: an exception of a signal handler finds it here, or not made

    def __len__(self) -> int:
        return self.left

    def __del__(self) -> None:
        for fd in getattr(self, "_own", ()):  # an interrupt may have come before it had one
            try:
                os.close(fd)
            except OSError:
                pass  # the descriptor is gone all the same

    def read(self, size: int) -> bytes:
        """So many bytes from its front, or fewer; none if the file has ended."""
        [fd] = self._own
        return read_at(fd, self.offset, size)

    def send(self, sock: socket.socket, size: int, sent: list[int]) -> None:
        """Send that many bytes from its front, and append to `sent` how many went, 0 if the file has ended."""
        [fd] = self._own
        if hasattr(os, "sendfile"):
            if os.get_blocking(sock.fileno()):  # another holder, by dup or fork, has cleared O_NONBLOCK
                os.set_blocking(sock.fileno(), False)
            send_file(sock, fd, self.offset, size, sent)
            return
        data = self.read(min(size, FILE_PIECE))
        sent.extend(map(sock.send, (data,), (SEND_FLAGS,)) if data else (0,))


class Outbox(ConnectionState):
    """The part of a connection that sends."""

    __slots__ = ()

    def send(self, message: Any, /) -> bool:
        self.mux._check_fork()
        return self._enqueue(self._encoded(message))

    def send_many(self, messages: Iterable[Any], /) -> bool:
        return self._each(self.send, messages)

    def write(self, data: Any, /) -> bool:
        self.mux._check_fork()
        return self._enqueue(as_bytes(data))

    def writelines(self, parts: Iterable[Any], /) -> bool:
        return self._each(self.write, parts)

    def _each(self, send: Callable[[Any], bool], messages: Iterable[Any]) -> bool:
        self.mux._check_fork()
        below = not (self._is_above_high or self._refuses_output())
        for message in messages:
            below = send(message)
        return below

    def sendfile(self, file: Any, /, offset: int = 0, count: int | None = None) -> bool:
        self.mux._check_thread()
        fd, size, data = file_part(file, offset, count)
        if data is not None:
            return self._may_queue() and self._accept_message(data)
        if not self._may_queue():
            return False
        if self._files >= FILES_KEPT:
            return self._overflow(of_files=True)
        part = (FilePart(fd, offset, size),)
        if not self.mux._in_turn:
            self._schedule()
        out = self._outbox()
        self._files += 1
        self._out_bytes += size
        self._file_bytes += size
        out += part
        return self._queued()

    def write_eof(self) -> None:
        self.mux._check_thread()
        if not self._refuses_output():
            self._schedule()
            self._write_eof = True

    def flush(self) -> int:
        self.mux._check_thread()
        self._send_out()
        return self._out_bytes

    @property
    def outbox_size(self) -> int:
        return self._out_bytes + self._foreign_bytes

    def _is_full(self) -> bool:
        reader = self._reader
        return reader is not None and reader.is_complete() and reader.size > self._policy.limits.max_inbox

    def _refuses_output(self) -> bool:
        return self._closing or self._ended or self._peer_gone or self._write_eof

    def _can_flush(self) -> bool:
        return bool(self._out or self._sent) and not (
            self._blocked or self._starved or self._ended or self._peer_gone or self._connecting
            or (self._handshake and self._wire is None)
        )

    def _encoded(self, message: Any) -> bytes | None:
        """A message as it goes onto the wire, or None if its framer is not there: it could not be made, or the
        connection has ended."""
        policy = None
        while policy is not self._policy:  # another thread may send while the framer is set
            policy, custom = self._policy, self._custom
            if id(type(policy.framer)) in SCANS:
                return encode(policy.framer, message)
            if custom is not None:
                return custom.encode(message)
        return None

    def _enqueue(self, data: bytes | None) -> bool:
        mux = self.mux
        if data is None:
            mux._count_drop()
            return False
        if mux._thread == get_ident():
            return self._may_queue() and self._accept_message(data)
        with mux._lock:  # see PythonCore._bind
            if not mux._on_other_thread():
                return self._may_queue() and self._accept_message(data)
        return self._enqueue_foreign(data)

    def _may_queue(self) -> bool:
        """Whether one more message is accepted; if not, the drop is counted or _overflow() called."""
        if self._refuses_output():
            self.mux._count_drop()
            return False
        return self._held() < self._policy.limits.max_outbox or self._overflow()

    def _held(self) -> int:
        """Bytes of memory of the outbox."""
        return self._out_bytes - self._file_bytes + self._foreign_bytes + self._foreign_entries * FOREIGN_COST

    def _accept_message(self, data: bytes) -> bool:
        size = len(data)
        if not self.mux._in_turn:
            self._schedule()
        if size >= SMALL_PIECE:
            out = self._outbox()
            self._out_bytes += size
            out += (data,)
        elif size:
            self._accept_piece(data, size)
        return self._queued()

    def _accept_piece(self, data: bytes, size: int) -> None:
        """Small pieces share a block: an object for each would use more memory than the outbox counts."""
        block = (bytearray(data),)
        out = self._outbox()
        last = out[-1] if out else None
        is_open = type(last) is bytearray and len(last) < BLOCK_SIZE
        out = self._outbox()  # again: start_tls() may have run
        # A signal handler may send amid a flush, when nothing may be added to what was offered to the kernel; or flush
        # in the line above, and then the block is gone.
        if is_open and not self._flushing and out and out[-1] is last:
            last += data
            self._out_bytes += size
            return
        self._out_bytes += size
        out += block

    def _outbox(self) -> deque[Any]:
        """Where output goes. From here on there is no call until it is there, and counted: interrupts come at calls."""
        return self._out if self._plain is None else self._plain

    def _has_output(self) -> bool:
        return bool(self._out or self._plain)

    def _queued(self) -> bool:
        """Schedule the flush of new output. Returns whether the outbox is below the high-water mark."""
        mux = self.mux
        if self._ended:  # by a signal handler amid this
            self._discard_outbox()
            mux._count_drop()
            return False
        mux._n.messages_out += 1
        if self._out_bytes > self._policy.limits.high:
            return self._above_high()
        if mux._in_handler is not self and self._has_output() and not self._blocked:
            if mux._flush_at_once and not mux._in_turn and (self._wire is not None or self._can_flush()):
                self._send_out()
            else:
                self._schedule()
        return not self._is_above_high

    def _above_high(self) -> bool:
        self._send_out()
        if self._out_bytes <= self._policy.limits.high:
            return not self._is_above_high
        if not self._is_above_high:
            self._schedule()
            self._is_above_high = True
            self._drain_owed = False
            self.mux._n.high_water_hits += 1
        return False

    def _overflow(self, of_files: bool = False) -> bool:
        limit, mux = self._policy.limits.max_outbox, self.mux
        if self._policy.limits.overflow != "drop" and not self._close_asked:
            text = f"outbox holds {self._held()} bytes, max_outbox is {limit}"
            if of_files:
                limit = FILES_KEPT
                text = f"outbox holds {limit} parts of files, the most it may"
            if self._policy.limits.overflow == "raise":
                raise OutboxFull(text, conn=self, limit=limit)  # with a name it would hold its own frame, and us
            error = OutboxFull(text, conn=self, limit=limit)
            if mux._on_other_thread():
                mux._from_foreign(self._abort, (error,))
                self._close_asked = True
            else:
                self._abort(error)
        mux._count_drop()
        return False

    def _enqueue_foreign(self, data: bytes) -> bool:
        with self.mux._lock:  # as in _advance_close
            refused = self._close_asked or self._refuses_output()
            full = self._held() >= self._policy.limits.max_outbox
            if not refused and not full:
                self._foreign_bytes += len(data)
                self._foreign_entries += 1
            below = self.outbox_size <= self._policy.limits.high
        if refused:
            self.mux._count_drop()
            return False
        if full:
            return self._overflow()
        self.mux._from_foreign(self._apply_foreign_send, (data, below))
        return below

    def _apply_foreign_send(self, data: bytes, was_below: bool) -> None:
        """It leaves the queue of the Mux, and is counted no more, in the lines in which it enters the outbox: these
        call nothing, and so no interrupt comes between."""
        mux, size = self.mux, len(data)
        out: Any = self._outbox()
        self._schedule()
        piece = (data if size >= SMALL_PIECE else bytearray(data),)
        last: Any = out[-1] if out else None
        is_open = type(last) is bytearray and len(last) < BLOCK_SIZE and size < SMALL_PIECE
        with mux._lock:
            refused = self._ended or self._peer_gone
            self._foreign_bytes -= size
            self._foreign_entries -= 1
            del mux._foreign[0]
            if refused:
                mux._n.drops += 1
            else:
                out = self._out if self._plain is None else self._plain
                self._out_bytes += size
                if is_open and not self._flushing and out and out[-1] is last:
                    last += data
                elif size:
                    out += piece
                if not was_below and not self._is_above_high:
                    self._drain_owed = True
        if not refused:
            self._queued()

    def _flush(self) -> None:
        if self._flushing:
            return  # a signal handler sends amid a flush, which goes on with that
        if not self.mux._in_turn:
            self.mux._now_ns = time.monotonic_ns()  # a stall begins now, and not with the last turn
        self._flushing = True
        try:
            self._flush_each()
        finally:
            self._flushing = False

    def _flush_each(self) -> None:
        while self._out or self._sent:
            try:
                if not self._sent:
                    self._offer()
            except OSError as error:
                if not from_call(error):
                    raise  # what the call has returned is in `_sent`, if it has
                self._send_failed(error)
                return
            if self._ended or not self._sent:
                return
            sent, offered = self._sent[0], self._offered
            self._wrote_ns = self.mux._now_ns
            self._consume()
            if sent < offered:
                self._wait_writable()
                break
        self._look_for_drain()

    def _look_for_drain(self) -> None:
        if self._is_above_high and self._out_bytes <= self._policy.limits.low:
            self._is_above_high = False
            self._received_ns = self.mux._now_ns  # until now we may not have listened
            self._drain_owed = True
            self._schedule()

    def _offer(self) -> None:
        """Give the kernel what stands before the next file, or some of it, or of the file."""
        out, sock, n = self._out, self._sock, self.mux._n
        first = out[0] if out else None
        if sock is None or first is None:
            return  # a signal handler has closed it
        if isinstance(first, FilePart):
            self._send_file(first, sock)
            return
        parts: list[Any] = list(takewhile(lambda part: not isinstance(part, FilePart), islice(out.copy(), MAX_PARTS)))
        if self._sent or not parts:
            return  # a signal handler has sent it
        if len(parts) == 1 or not hasattr(sock, "sendmsg"):
            n.send_calls += 1
            self._offered = len(parts[0])
            self._sent.extend(map(sock.send, (parts[0],), (SEND_FLAGS,)))
        else:
            n.sendmsg_calls += 1
            self._offered = sum(map(len, parts))
            self._sent.extend(map(sock.sendmsg, (parts,), ((),), (SEND_FLAGS,)))

    def _send_file(self, part: FilePart, sock: socket.socket) -> None:
        """As _offer. A short send of a file ends its turn, too."""
        self.mux._n.send_calls += 1
        self._offered = part.left
        part.send(sock, min(part.left, FILE_BURST), self._sent)
        if self._sent == [0]:
            self._abort(OSError(f"sendfile: the file ended {part.left} bytes before the end of the queued part"))

    def _consume(self) -> None:
        """Remove the bytes that the kernel has accepted from the front of the outbox. No step has a call within it."""
        out, sent, n = self._out, self._sent, self.mux._n
        while sent:
            size, first = sent[0], out[0] if out else b""
            length = len(first)
            part = first if isinstance(first, FilePart) else None
            rest = memoryview(first)[size:] if part is None and size < length else None  # type: ignore[arg-type]
            taken = min(size, length)
            if not sent or not out or out[0] is not first:
                continue  # a signal handler has closed it
            if part is not None:
                part.offset += taken
                part.left -= taken
                self._file_bytes -= taken
            if rest is not None:
                out[0] = rest
            elif size >= length:
                del out[0]
                self._files -= part is not None
            self._out_bytes -= taken
            n.bytes_out += taken
            if size > taken:
                sent[0] = size - taken
            else:
                del sent[0]

    def _wait_writable(self) -> None:
        self.mux._n.would_blocks += 1
        self._blocked = True
        self._schedule()

    def _send_failed(self, error: OSError) -> None:
        if isinstance(error, BlockingIOError):
            if self._sock is not None:
                discard_error_queue(self._sock)  # perhaps it seemed writable only for that
            self._wrote_ns = self.mux._now_ns
            self._wait_writable()
        elif error.errno in TRY_LATER:
            self._starved = True
            self.mux._add_timer(time.monotonic_ns() + STARVED_NS, self._retry_send, ())
        elif not self._ended:
            self._discard_outbox()
            if error.errno not in PEER_GONE or self._closing:
                self._end(error)
            else:
                self._peer_gone = True
                self._keep_error(error)
                self._reset_on_close()
                self._schedule()

    @own_step
    def _retry_send(self) -> None:
        self._starved = False
        self._schedule()

    def _discard_outbox(self) -> None:
        self.mux._n.unsent += self._has_output()
        self._out.clear()
        if self._plain is not None:
            self._plain.clear()
        self._sent.clear()
        self._out_bytes = self._file_bytes = self._files = 0
        self._is_above_high = self._drain_owed = self._blocked = self._starved = False

    def _send_out(self) -> None:
        if self._wire is not None:
            self._flush_wire()
        elif self._can_flush():
            self._flush()

    def _unsent(self) -> int:
        """Bytes that the peer's kernel has not acknowledged, if the system reports them."""
        try:
            return int.from_bytes(fcntl.ioctl(self.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        except (OSError, ValueError, NameError) as error:  # the second: a signal handler has closed it
            if not from_call(error):
                raise
            return 0
