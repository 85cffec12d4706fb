"""What may live here: input: reading, framing, delivery."""

from __future__ import annotations

import time

from .._address import DONTWAIT
from .._custom import FRONT, CustomReader, Found, rest_for_next
from .._frame import NOTHING, SCANS, Reader, check_framer
from .._typing import TYPE_CHECKING
from .._watch import ERROR, HANGUP
from ..errors import FrameError, from_call, without_frames
from .outbox import Outbox
from .pollers import OPENED, READABLE
from .syscalls import discard_error_queue

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Self

WARY_READ = 4096  # bytes of a read if the last one was fruitless


class Inbox(Outbox):
    """The part of a connection that receives."""

    __slots__ = ()

    def recv(self, default: Any = None) -> Any:
        self.mux._check_thread()
        message = self._take(judges=False)
        return default if message is NOTHING else message

    def recv_all(self) -> list[Any]:
        self.mux._check_thread()
        messages, _ = self._take_all(judges=False)
        return messages

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        self.mux._check_thread()
        message = self._take(judges=False)
        if message is NOTHING:
            raise StopIteration
        return message

    @property
    def inbox_size(self) -> int:
        self.mux._check_thread()
        reader = self._reader
        if isinstance(reader, Reader):
            return reader.size
        return len(reader.rest()) if reader is not None else 0

    @property
    def unread(self) -> bytes:
        self.mux._check_thread()
        return self._reader.rest() if self._reader is not None else b""

    def pause_reading(self) -> None:
        self.mux._check_thread()
        if not (self._paused or self._closing or self._ended):
            self._schedule()
            self._paused = True

    def resume_reading(self) -> None:
        self.mux._check_thread()
        if self._paused:
            self._schedule()
            self._received_ns = self._heard_ns = time.monotonic_ns()
            self._paused = False
            self._report_complete()

    def is_reading(self) -> bool:
        self.mux._check_thread()
        return self._may_read() and not self._closing

    @property
    def framer(self) -> Any:
        return self._policy.framer

    @framer.setter
    def framer(self, value: Any) -> None:
        self.mux._check_thread()
        check_framer(value)
        former, _ = self._change_framer(value)
        self._report_complete()
        if former is not None:
            former.forget()  # may run finalizers

    def _change_framer(self, value: Any) -> tuple[CustomReader | None, bytes]:
        """Give what is not delivered yet to the new framer. Returns the reader of a user's framer, to be forgotten, and
        what the new one has got."""
        custom = None if id(type(value)) in SCANS else CustomReader(value)
        nothing: list[Any] = []
        while True:  # each of these calls may run anything, which may read, or set a framer, too
            before, old = self._policy, self._reader
            changes = 0 if old is None else old.changes
            policy = before.changed(before.limits, before.timeouts, value)
            rest = b"" if old is None else rest_for_next(old)
            reader = (custom or Reader(value)) if rest or (old is not None and old.feeding) else None
            if reader is not None:
                reader.feed(rest)
            if self._policy is before and self._reader is old and (old is None or old.changes == changes):
                break
            if custom is not None:
                custom.data = b""
        former = self._custom
        if self._closing or (self._ended and not policy.pull):  # else it stays until it is received, as in _finish()
            reader = None
        elif isinstance(old, CustomReader) and old.feeding:
            former = former if old.left else None
            old.behind, old.left, reader = reader, True, old
        # A thread that sends meanwhile finds no policy whose encoder is not there.
        self._custom, self._policy, self._reader, self._custom = custom or self._custom, policy, reader, custom
        if reader is old:
            pass
        elif isinstance(old, CustomReader | Found):
            old.found, nothing = nothing, old.found
        elif old is not None:
            old.ahead = NOTHING  # a signal handler may run this as a take() of it begins
        self._schedule()
        return former, rest

    def _may_deliver(self) -> bool:
        return not (self._paused or self._on_hold or self._closing or (self._is_above_high and self._policy.autopause))

    def _may_read(self) -> bool:
        if self.eof or self._ended or self._connecting:
            return self._fin_unread and self._closing and not self._ended
        if self._closing or self._handshake:
            return True
        return self._may_deliver() and not self._is_full()

    def _read_turn(self, reported: int) -> None:
        mux, sock = self.mux, self._sock
        n, budget = mux._n, 0 if self._policy.pull else mux._read_budget
        while sock is not None and not self._waits_for_run_pending():
            n.recv_calls += 1
            mux._resume_read()  # nothing, or what else would be taken for this connection's
            mux._reading = self
            room = mux._read_size if self._wire is None or self._fruitful else min(mux._read_size, WARY_READ)
            try:
                mux._read.extend(map(sock.recv, (room,), (DONTWAIT,)))  # as in _flush
            except OSError as error:
                if not from_call(error):
                    raise
                self._read_failed(error)
                return
            size = len(mux._read[0])
            if not size:
                self._read_eof()
                return
            n.bytes_in += size
            self._heard_ns = mux._now_ns
            self._receive()
            if self._wire is not None:
                mux._look_at_clock()  # it may have taken long, whatever came of it
            budget -= size
            more = budget > 0 and (size == room or reported & (ERROR | HANGUP))
            if more:
                self._send_out()  # which may pause or end it
            if not self._may_read() or mux._close_requested:
                self._schedule()
                return
            if not more or mux._tick():
                return

    def _waits_for_run_pending(self) -> bool:
        """Whether a turn that lasted too long has left messages, or on_open, which go first."""
        if self._handshaking:
            return True
        return self._pending and (not self._reported & OPENED or (self._reader is not None and not self._policy.pull))

    def _make_custom(self) -> None:
        """What an accepted connection needs if its framer is a user's own. An interrupt leaves it to _run_pending()."""
        framer = self._policy.framer
        if id(type(framer)) in SCANS or self._custom is not None or self._closing:
            return
        try:
            custom = CustomReader(framer)
        except Exception as error:
            self.mux._check_fork()
            self._user_failed("framer", error)
            return
        self.mux._check_fork()
        if self._policy.framer is framer and self._custom is None and not self._ended:
            self._custom = custom

    def _new_reader(self) -> Reader | CustomReader:
        return self._custom or Reader(self._policy.framer)

    def _resume_read(self) -> None:
        """Go on with a read that an interrupt has ended before what it brought was anywhere."""
        if self.mux._read[0]:
            self._receive()
        else:
            self._read_eof()
        self._schedule()

    def _receive(self) -> None:
        """Deliver what was read, or keep it. It is the Mux's until then: an interrupt leaves it there."""
        if self._wire is not None:
            self._give_wire(self._wire)
        else:
            self._accept_input(self.mux._read)

    def _accept_input(self, read: list[bytes]) -> None:
        """The first of `read`, which has what came, for the framer."""
        policy = self._policy
        if self._closing or self._ended:
            read.clear()
        elif policy.framer is None and self._reader is None and not policy.pull and self._may_deliver():
            self._run_in_handler(self._deliver_chunk, read)
        else:
            self._feed(read)
            if policy.pull:
                self._report_complete()
            else:
                self._run_in_handler(self._deliver)

    def _feed(self, read: list[bytes]) -> None:
        """Keep what was read. A signal handler that comes amid this may set a framer or end the connection: then the
        reader is looked up again."""
        while not (self._closing or self._ended):
            policy, first, found = self._policy, self._reader, None
            reader = first
            while isinstance(reader, Found) or (isinstance(reader, CustomReader) and reader.left):
                found, reader = reader, reader.behind
            if reader is None:
                reader = self._new_reader()
                if self._reader is not first or self._policy is not policy:
                    continue
                if found is None:
                    self._reader = first = reader
                else:
                    found.behind = reader
            if reader.feed(read[0], self, first):
                del read[0]
                return
        read.clear()

    def _deliver_chunk(self, read: list[bytes]) -> None:
        """Without a framer, what a read has brought is one message."""
        mux, policy = self.mux, self._policy
        mux._n.messages_in += 1
        self._received_ns = mux._now_ns
        data = read[0]
        try:
            if policy.on_messages is not None:
                messages = [data]
                del read[0]
                policy.on_messages(self, messages)
            else:
                del read[0]
                if policy.on_message is not None:
                    policy.on_message(self, data)
        except Exception as error:
            self._failed = error
            self._handler_raised(error)
        mux._check_fork()

    def _deliver(self) -> None:
        """Hand complete messages to the handler while it may have them; it may change everything on the way."""
        mux, policy = self.mux, self._policy
        while not (self._ended or mux._close_requested):
            if policy.on_messages is not None:
                if not self._deliver_list(policy.on_messages):
                    return
            else:
                if (message := self._take(judges=True)) is NOTHING:
                    return
                mux._notified = True
                try:
                    if policy.on_message is not None:
                        policy.on_message(self, message)
                except Exception as error:
                    self._failed = error
                    self._handler_raised(error)
                del message  # its finalizer runs here
                mux._check_fork()
            if mux._tick():
                self._schedule()
                return

    def _deliver_list(self, on_messages: Callable[..., object]) -> bool:
        """Hand out all complete messages in one list, if there are any."""
        messages, taken_from = self._take_all(judges=True)
        if not messages:
            return False
        may_deliver = False
        try:
            may_deliver = self._may_deliver() and not self.mux._close_requested
        finally:  # an interrupt, or what found them has closed or paused the connection
            if not may_deliver:
                self._give_back(messages, *taken_from)
        if not may_deliver:
            return False
        self.mux._notified = True
        try:
            on_messages(self, messages)
        except Exception as error:
            self._failed = error
            self._handler_raised(error)
        self.mux._check_fork()
        return True

    def _has_message(self, judges: bool) -> bool:
        """Whether there is a complete message that may be delivered. `judges`: malformed input closes the connection;
        else it is found again later, since the user may be about to change the framer."""
        while (reader := self._reader) is not None and self._may_deliver():
            if isinstance(reader, CustomReader) and reader.left:
                if reader.feeding:
                    return False
                self._hand_on(reader)
                continue
            try:
                found = reader.peek(False) is not NOTHING
                if not found and self.eof and self._reader is reader and not reader.left:
                    found = reader.peek(True) is not NOTHING
            except Exception as error:
                self.mux._check_fork()
                if not isinstance(reader, CustomReader) and not from_call(error):
                    raise  # a signal handler has raised it
                if judges:
                    self._input_failed(error)
                else:
                    self._schedule()
                    without_frames(error)  # its frames hold the reader, which holds it
                return False
            self.mux._check_fork()
            if self._closing or (self._ended and not self._policy.pull) or self.mux._close_requested:
                return False
            if self._reader is not reader or (isinstance(reader, CustomReader) and reader.left):
                continue  # it has set another framer
            if found:
                return self._may_deliver()
            if not isinstance(reader, Found):
                self._drop_empty_reader()
                return False
            self._reader = reader.behind
        return False

    def _hand_on(self, reader: CustomReader) -> None:
        """Another framer was set amid a call of this one, which has returned: its messages go first, and the next
        framer gets the rest."""
        rest = reader.last_rest()
        self.mux._check_fork()
        behind = reader.behind
        front = Found(reader.found, reader.encode, behind)
        is_custom = isinstance(behind, CustomReader)
        if self._reader is not reader or reader.behind is not behind or self._closing:
            return
        if is_custom:
            behind.data = rest + behind.data
        else:
            behind.data[FRONT] = rest
        self._reader, reader.behind = front, None
        reader.forget()  # may run finalizers

    def _take(self, judges: bool) -> Any:
        """The next message, or NOTHING. `judges`: see _has_message; a method that the user calls runs no callback.

        Behind take() there is no call, and so no interrupt."""
        mux = self.mux
        while self._has_message(judges):
            if self._policy.pull:
                self._schedule()  # there may be room to read again, an EOF to report, or something wrong
            now = mux._now_ns if mux._in_turn else time.monotonic_ns()
            reader = self._reader
            message = NOTHING if reader is None else reader.take()
            if message is not NOTHING:
                mux._n.messages_in += 1
                self._received_ns = now
                return message
        return NOTHING

    def _take_all(self, judges: bool) -> tuple[list[Any], tuple[Any, int]]:
        """All complete messages, and the arguments of _give_back. What is wrong behind them is found again with the
        next look for more."""
        messages: list[Any] = []
        first = self._reader
        taken_from = first, 0 if first is None else first.start
        try:
            self._collect(messages, judges)
            if self._policy.pull:
                self._schedule()
        except BaseException:
            self._give_back(messages, *taken_from)
            raise
        return messages, taken_from

    def _collect(self, messages: list[Any], judges: bool) -> None:
        mux = self.mux
        while self._has_message(judges and not messages):
            now = mux._now_ns if mux._in_turn else time.monotonic_ns()
            reader = self._reader
            message = NOTHING if reader is None else reader.take()
            if message is not NOTHING:
                messages.append(message)
                mux._n.messages_in += 1
                self._received_ns = now
            if not self._policy.pull and mux._tick():
                return

    def _give_back(self, messages: list[Any], reader: Any, start: int) -> None:
        """Return messages to the inbox that `reader` has found: an interrupt, or code that has run meanwhile, prevents
        their delivery."""
        self.mux._n.messages_in -= len(messages)
        if not messages or self._closing:
            return
        self._schedule()
        behind = self._reader
        if behind is reader or (behind is None and reader.framer is self._policy.framer):
            reader.put_back(messages, start)
            self._reader = reader
        else:
            self._put_in_front(messages, reader)

    def _put_in_front(self, messages: list[Any], reader: Any) -> None:
        """Put messages in front of the inbox that recv() has removed, or that a former reader has found."""
        self._reader = Found(messages, reader.encode, self._reader)

    def _input_failed(self, error: Exception) -> None:
        if issubclass(type(error), FrameError):
            if self in self.mux._offloaded:
                without_frames(error)  # it is found again once the messages before it are replied to
            else:
                self._peer_failed(error)
        else:
            self._user_failed("framer", error)

    def _drop_empty_reader(self) -> None:
        """An idle connection has no buffer."""
        reader = self._reader  # a signal handler may close the connection behind each call
        if isinstance(reader, Reader) and not reader.size:
            self._reader = None

    def _report_complete(self) -> None:
        """Pull style: there is a message to be received."""
        if self._policy.pull and self._has_message(judges=False):
            self._report_flag(READABLE)

    def _read_failed(self, error: OSError) -> None:
        if not isinstance(error, BlockingIOError):
            # Behind the wire's end a reset is no error: with a FIN in its place nothing more would have been read.
            self._end(None if self._fin_unread and not self._has_output() else error)
        elif self._peer_gone:
            self._end(None)
        elif self._sock is not None:
            discard_error_queue(self._sock)  # perhaps it seemed readable only for that

    def _read_eof(self) -> None:
        self.mux._read.clear()
        if self._peer_gone:
            self._end(None)
        elif self._wire is not None:
            self._wire_eof(self._wire)
        else:
            self._set_eof()

    def _set_eof(self) -> None:
        self._schedule()
        self.eof = True
        if self._reader is not None:
            self._report_complete()  # what is left may be a message now
