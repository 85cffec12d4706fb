"""What may live here: the model: what must be true of each connection, whatever user code did and when.

A peer sends atoms, `A000007`: the tag of its connection and a number that counts up. A connection sends `a000007`. So
the framing may change in the middle: whatever the messages were, the atoms in them are those sent, once, in order.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import muxcore

ATOM_IN = re.compile(rb"[A-Z]\d{6}")
ATOM_OUT = re.compile(rb"[a-z]\d{6}")
BROADCAST = "z"  # the tag of what is sent to several at once

# What one connection may end with: what a scenario raises, what muxcore says of bad input and full outboxes, what the
# system says of a peer that is gone. Anything else was raised by the core itself.
EXPECTED_ENDS = (muxcore.MuxError, OSError)
GENERATOR = "generator already executing"  # user code called recv() in the middle of its own framer's feed()


class Hostile(Exception):
    """What an action raises."""


class Out:
    """One atom that was sent to the peer. certain: True, it must arrive; False, it must not; None, it may."""

    __slots__ = ("atom", "certain", "loose")

    def __init__(self, atom: bytes) -> None:
        self.atom = atom
        self.certain: bool | None = None
        self.loose = True  # another one was sent while this one was: their order is open


class Link:
    """One connection, its peer, and all that both of them have seen."""

    def __init__(self, tag: str, style: str, framing: str, complain: Callable[[str], None]) -> None:
        self.tag, self.style, self.framing = tag, style, framing
        self._complain = complain
        self.conn: Any = None
        self.peer: Any = None
        self.factory: Any = None  # of its own framer, if it has one
        self.bounded = False  # its outbox is small: what is sent may be refused
        self.victim = False  # its handler raises
        self.outbound = False  # made by connect(), or with a wire, which may fail: then it was never open
        self.shut = False  # write_eof() was called
        self.paused = False
        self.detached: Any = None  # what detach() has given
        self.to_accept = False  # its peer is the client of a listener, until on_open
        self.ended_elsewhere = False  # by another thread: the Mux's own may send until it learns of it
        self.reads = True  # its peer reads
        self.sent = 0  # atoms, by the peer
        self.input = bytearray()  # what was delivered
        self.opened = self.closed = self.eofs = self.errors = self.count = 0
        self.malformed = ""  # what is wrong with what the peer has sent: "input" or "message"
        self.sends_malformed = False  # its peer, with the next messages
        self.refuses_message = False  # its handler raises a FrameError
        self.reframed = False  # its new framer may refuse what is good, and read what is malformed
        self.error: BaseException | None = None  # that on_error got
        self.end = ""  # its first cause: close, abort, detach, raise, eof, mux, unaccepted
        self.late = 0  # messages after that
        self.allowed_late = 0
        self.reentrant = False  # a recv() ran inside another one: the order of their messages is open
        self.lossy = ""  # why input may be missing
        self.outs: list[Out] = []
        self.numbers = itertools.count()  # of outs: a finaliser may send between any two lines of Python
        self.arrived = bytearray()
        self.peer_done = False

    def complain(self, what: str) -> None:
        self._complain(f"{self.tag} ({self.style}, {self.framing}): {what}")

    # -- while it runs

    def on_open(self, conn: Any) -> None:
        self.conn = conn
        self.to_accept = False
        self.opened += 1
        if self.end == "unaccepted":
            self.end = ""
        if self.opened > 1 or self.closed:
            self.complain(f"on_open is call {self.opened}, after {self.closed} of on_close")

    def on_messages(self, messages: list[Any], ended: str) -> None:
        """What came in one list; `ended`: its end at the moment at which no message of the list must come any more."""
        if ended and messages:
            self.was_late(ended)
        for message in messages:
            self.keep(message)

    def on_message(self, message: Any) -> None:
        if self.end or self.paused:
            self.was_late(self.end or self.held())
        self.keep(message)

    def held(self) -> str:
        """Why no message may come for now."""
        return "pause_reading" if self.paused else ""

    def was_late(self, ended: str, what: str = "a message") -> None:
        self.late += 1
        if self.late > self.allowed_late:
            self.complain(f"{what} after {ended}")

    def keep(self, message: Any) -> None:
        if self.closed:
            self.complain("a message after on_close")
        if not self.opened and self.style != "pull":
            self.complain("a message before on_open")
        self.input += b" ".join(message) if isinstance(message, list) else bytes(message)

    def refuse(self) -> None:
        """What a handler does with a message that it refuses."""
        if self.refuses_message and not self.malformed:
            self.malformed = "message"
            raise muxcore.FrameError("a handler")

    def on_error(self, conn: Any, exc: BaseException) -> None:
        self.errors += 1
        if self.errors > 1 or self.closed or not self.opened:
            self.complain(f"on_error is call {self.errors}, after {self.opened} on_open and {self.closed} on_close")
        if not isinstance(exc, muxcore.FrameError) or exc.conn is not conn or conn.error is not exc:
            self.complain(f"on_error({exc!r}) of a connection with {conn.error!r}")
        if not self.malformed and not self.reframed:
            self.complain("on_error without a cause")
        if self.end:
            self.was_late(self.end, "on_error")
        elif self.malformed == "input" and not self.reframed and not self.complete_input():
            self.complain("on_error before the messages in front of what is malformed")
        self.error = exc
        self.begin_end("error")

    def on_close(self, exc: BaseException | None) -> None:
        self.closed += 1
        if self.error is not None and exc is not self.error:
            self.complain(f"on_close({exc!r}) after on_error({self.error!r})")
        if self.closed > 1:
            self.complain("on_close twice")
        if exc is not None and not self.expected(exc):
            self.complain(f"on_close({exc!r})")

    def begin_end(self, how: str) -> None:
        if self.end in ("", "unaccepted"):
            self.end, self.late = how, 0
        if how in ("abort", "mux", "detach"):
            self.lossy = self.lossy or how

    def expected(self, exc: BaseException) -> bool:
        if self.outbound and (isinstance(exc, KeyboardInterrupt) or str(exc) == "the Mux is closed"):
            return True  # by a signal handler amid its connect()
        return isinstance(exc, (Hostile, *EXPECTED_ENDS)) or GENERATOR in str(exc)

    def refuses(self) -> bool:
        return bool(self.conn is None or self.shut or self.conn.closing)

    # -- afterwards

    def complete(self) -> bool:
        """Whether all that the peer has sent was delivered, as far as it must be."""
        return bool(self.end) or self.over() or (self.complete_input() and not self.owes_error())

    def complete_input(self) -> bool:
        return len(ATOM_IN.findall(bytes(self.input))) >= self.sent

    def owes_error(self) -> bool:
        """Whether what is malformed has to end it."""
        return bool(self.malformed) and not self.reframed

    def over(self) -> bool:
        return self.conn is not None and bool(self.conn.closing)

    def check_input(self, finished: bool) -> None:
        atoms = ATOM_IN.findall(bytes(self.input))
        wanted = [b"%s%06d" % (self.tag.encode(), i) for i in range(self.sent)]
        foreign = [atom for atom in atoms if atom[:1] != self.tag.encode()]
        if foreign:
            self.complain(f"input of another connection: {foreign[:3]}")
            return
        if self.reentrant:
            if len(set(atoms)) != len(atoms):
                self.complain("a message twice")
            atoms.sort()
        if finished and atoms != wanted:
            self.complain(f"of {len(wanted)} messages these were delivered: {numbers(atoms)}")
        elif not finished and atoms != wanted[: len(atoms)] and not self.reentrant:
            self.complain(f"not what was sent in order: {numbers(atoms)} of {len(wanted)}")

    def check_output(self) -> None:
        data = bytes(self.arrived)
        atoms = ATOM_OUT.findall(data)
        rest = ATOM_OUT.sub(b"", data)
        if re.search(rb"[A-Za-z]", rest) and self.end != "abort" and "abort" not in self.lossy:
            self.complain(f"torn or foreign output: {rest[:60]!r}")
        own = [atom for atom in atoms if atom[:1] != BROADCAST.encode()]
        foreign = [atom for atom in own if atom[:1] != self.tag.lower().encode()]
        if foreign:
            self.complain(f"output of another connection: {foreign[:3]}")
        if len(set(own)) != len(own):
            self.complain(f"output twice: {numbers(own)}")
        strict = [out.atom for out in self.outs if not out.loose]
        kept = [atom for atom in own if atom in set(strict)]
        if kept != sorted(kept):
            self.complain(f"output out of order: {numbers(kept)}")
        if any(out.certain is False and out.atom in own for out in self.outs):
            self.complain("output that was sent after its end has arrived")
        missing = [out.atom for out in self.outs if out.certain and out.atom not in own]
        if missing and not self.lossy and not self.bounded and self.reads:
            self.complain(f"accepted output is lost: {numbers(missing)}, {len(own)} arrived")

    def check_callbacks(self, reports: bool, interrupted: bool) -> None:
        """`reports`: polls went on to the end, so that CLOSED was reported. `interrupted`: a KeyboardInterrupt came."""
        if self.conn is None:
            return
        if not self.conn.closed:
            self.complain("open after all was closed")
        if self.opened != 1 and not self.outbound and (self.style != "pull" or reports):
            self.complain(f"on_open was called {self.opened} times")
        if self.closed != 1 and (self.style != "pull" or reports):
            self.complain(f"on_close was called {self.closed} times")
        error = self.conn.error
        if error is not None and not self.expected(error):
            self.complain(f"it ended with {error!r}")
        if error is None and not self.end:
            self.complain("it ended without a cause")
        owed = isinstance(error, muxcore.FrameError) and self.style != "pull" and not self.outbound
        if owed and not self.errors and not self.end and not interrupted:
            self.complain(f"it ended with {error!r}, and on_error was not called")


def numbers(atoms: list[bytes]) -> str:
    shown = ",".join(str(int(atom[1:])) for atom in atoms[:12])
    return shown + (f",... ({len(atoms)})" if len(atoms) > 12 else "")
