"""What may live here: the frozen settings of a connection (Limits, Timeouts), checked when they are made.

Plain Python: they are read once per listener, when its policy is compiled, never per message.
"""

from __future__ import annotations

from ._frozen import Frozen
from ._typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any, Literal

    Overflow = Literal["close", "drop", "raise"]

OVERFLOWS = ("close", "drop", "raise")


def check_int(name: str, value: object, minimum: int, maximum: int = 1 << 62) -> int:
    """The int that `value` is, if it is one in that range; else raise TypeError or ValueError naming the argument.

    Here and below: an int or a float itself, whatever a class of the user's makes of comparing one.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    value = int.__index__(value)
    if value < minimum:
        raise ValueError(f"{name} must be >= {minimum}, not {value}")
    if value > maximum:
        raise ValueError(f"{name} must be <= {maximum}, not {value}")
    return value


def check_seconds(name: str, value: object) -> float:
    """The number that `value` is, if it is a finite one of seconds >= 0; else raise TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number of seconds, not {type(value).__name__}")
    value = int.__index__(value) if isinstance(value, int) else float.__float__(value)
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a finite number of seconds >= 0, not {value}")
    return value


def plain_str(value: Any) -> Any:
    """The str that `value` is, if it is one."""
    return str.__str__(value) if isinstance(value, str) else value


def to_ns(seconds: float) -> int:
    """Nanoseconds, at least one unless it is 0. Half a year is for ever here, so that sums fit into 64 bits."""
    return max(int(min(seconds, 1.6e7) * 1e9), seconds > 0)


class Limits(Frozen):
    """What one connection may keep in memory, in bytes.

    high, low: water marks of the outbox. `send` answers False above `high`; `on_drain` comes once it is back at `low`.
    max_outbox: a message is accepted while the outbox is below this; beyond it, `overflow` decides.
    max_inbox: a connection whose undelivered input exceeds this is not read from.
    autopause: do not read from, nor deliver to, a connection that is above `high`. None: on for accepted and attached
        connections, off for those made by `connect`, since two such ends could wait for each other.
    overflow: "close" aborts the connection with OutboxFull; "drop" counts and drops the message; "raise" raises.
    """

    __slots__ = ("high", "low", "max_outbox", "max_inbox", "autopause", "overflow")  # noqa: RUF023 -- as in repr

    high: int
    low: int
    max_outbox: int
    max_inbox: int
    autopause: bool | None
    overflow: Overflow

    def __init__(
        self,
        *,
        high: int = 65536,
        low: int = 16384,
        max_outbox: int = 16777216,
        max_inbox: int = 1048576,
        autopause: bool | None = None,
        overflow: Overflow = "close",
    ) -> None:
        low = check_int("low", low, 0)
        high = check_int("high", high, 0)
        max_outbox = check_int("max_outbox", max_outbox, 1)
        max_inbox = check_int("max_inbox", max_inbox, 1)
        if low > high:
            raise ValueError(f"low must be <= high, not {low} > {high}")
        if high > max_outbox:
            raise ValueError(f"high must be <= max_outbox, not {high} > {max_outbox}")
        if autopause is not None and not isinstance(autopause, bool):
            raise TypeError(f"autopause must be True, False or None, not {autopause!r}")
        overflow = plain_str(overflow)
        if type(overflow) is not str or overflow not in OVERFLOWS:
            raise ValueError(f"overflow must be one of {OVERFLOWS}, not {overflow!r}")
        self._set(
            high=high, low=low, max_outbox=max_outbox, max_inbox=max_inbox, autopause=autopause, overflow=overflow
        )


class Timeouts(Frozen):
    """How long one connection may take, in seconds; None is for ever.

    idle: no message has come. The pieces of an unfinished one do not count, so a peer that sends a byte now and then
        cannot stay; a peer that sends large messages slowly needs a longer timeout.
    write: the outbox is not empty and the peer takes nothing of it (at most 30 s while closing).
    silence: no byte has come from the peer, and none has gone to it. A peer that reads a long download is idle, but not
        silent. `on_close` gets IdleTimeout, as for `idle`.
    connect: `Mux.connect`, from the name's resolution to the open connection. (Set later, it changes nothing.)
    linger: how long a closing connection whose output is all sent waits for the peer's FIN.

    The clocks of `idle` and `silence` stand still while you have paused the connection, and while its messages are in
    the threads of a Threaded.
    """

    __slots__ = ("idle", "write", "connect", "linger", "silence")  # noqa: RUF023 -- as in repr

    idle: float | None
    write: float | None
    connect: float | None
    linger: float
    silence: float | None

    def __init__(
        self,
        *,
        idle: float | None = None,
        write: float | None = None,
        connect: float | None = 30.0,
        linger: float = 5.0,
        silence: float | None = None,
    ) -> None:
        self._set(
            idle=_check_limit("idle", idle),
            write=_check_limit("write", write),
            connect=_check_limit("connect", connect),
            linger=check_seconds("linger", linger),
            silence=_check_limit("silence", silence),
        )


def _check_limit(name: str, value: float | None) -> float | None:
    if value is None:
        return None
    seconds = check_seconds(name, value)
    if seconds == 0:
        raise ValueError(f"{name} must be > 0 or None, not {seconds}")
    return seconds


def as_limits(value: object) -> Limits:
    """`value`, or the defaults for None; TypeError for anything else."""
    if value is not None and not isinstance(value, Limits):
        raise TypeError(f"limits must be a muxcore.Limits or None, not {type(value).__name__}")
    return value or Limits()


def as_timeouts(value: object) -> Timeouts:
    """`value`, or the defaults for None; TypeError for anything else."""
    if value is not None and not isinstance(value, Timeouts):
        raise TypeError(f"timeouts must be a muxcore.Timeouts or None, not {type(value).__name__}")
    return value or Timeouts()
