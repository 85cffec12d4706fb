"""What may live here: what `Mux.poll` reports of a connection in pull style."""

from __future__ import annotations

from enum import IntFlag

from ._typing import TYPE_CHECKING


class Report(IntFlag):
    """What is new of a connection since the last `poll`; several are or'ed.

    OPENED: it is new, or connected. READABLE: messages came, though it had none. DRAINED: its outbox, having been above
    `Limits.high`, is down to `Limits.low`. EOF: the peer has sent its FIN; once, after its messages. CLOSED: it has
    ended, and `conn.error` has the reason.
    """

    OPENED = 1
    READABLE = 2
    DRAINED = 4
    EOF = 8
    CLOSED = 16

    # A test of a flag, in a loop over what poll returns, in 20 ns instead of 500. It makes a plain int.
    if not TYPE_CHECKING:
        __and__, __rand__ = int.__and__, int.__rand__


OPENED, READABLE, DRAINED, EOF, CLOSED = Report
REPORTS = tuple(map(Report, range(32)))
