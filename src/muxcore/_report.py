"""What may live here: what `Mux.poll` reports of a connection in pull style."""

from __future__ import annotations

from enum import IntFlag

from ._typing import TYPE_CHECKING


class Report(IntFlag):
    """The news of a connection since the last `poll`, as flags that may be combined.

    OPENED: it is open. READABLE: messages have arrived. DRAINED: its outbox exceeded `Limits.high`, and has fallen to
    `Limits.low`. EOF: the peer has sent its FIN; once, after its messages. CLOSED: it has ended, and `conn.error` has
    the reason.
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
