"""What may live here: the frozen settings of a connection (Limits, Timeouts), checked when they are made.

Plain Python: they are read once per listener, when its policy is compiled, never per message.
"""

from __future__ import annotations

from ._frozen import Frozen
from ._typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any, Literal, TypeVar

    Overflow = Literal["close", "drop", "raise"]
    S = TypeVar("S", "Limits", "Timeouts")

OVERFLOWS = ("close", "drop", "raise")


def check_int(name: str, value: object, minimum: int, maximum: int = 1 << 62) -> int:
    """`value` as a plain int in that range; else raise TypeError or ValueError naming the argument.

    Here and below the result is a plain int or float, so a comparison runs no method of a user's subclass.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    value = int.__index__(value)
    if value < minimum:
        raise ValueError(f"{name} must be >= {minimum}, not {value}")
    if value > maximum:
        raise ValueError(f"{name} must be <= {maximum}, not {value}")
    return value


def check_callable(fn: object) -> None:
    if not callable(fn):
        raise TypeError(f"fn must be callable, not {type(fn).__name__}")


def check_seconds(name: str, value: object) -> float:
    """`value` as a finite number of seconds >= 0; else raise TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number of seconds, not {type(value).__name__}")
    value = int.__index__(value) if isinstance(value, int) else float.__float__(value)
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a finite number of seconds >= 0, not {value}")
    return value


def plain_str(value: Any) -> Any:
    """`value` as a plain str, if it is a str."""
    return str.__str__(value) if isinstance(value, str) else value


def to_ns(seconds: float) -> int:
    """Nanoseconds, at least 1 unless `seconds` is 0. At most half a year, so that sums fit into 64 bits."""
    return max(int(min(seconds, 1.6e7) * 1e9), seconds > 0)


class Limits(Frozen):
    """The memory bounds of one connection, in bytes.

    high, low: the water marks of the outbox. `send` returns False above `high`; `on_drain` is called once the outbox
        is at or below `low` again.
    max_outbox: the outbox accepts a message while it holds less than this; then `overflow` decides.
    max_inbox: a connection with more undelivered input is not read.
    autopause: above `high`, neither read from the connection nor deliver its messages. None: on for accepted and
        attached connections, off for those made by `connect`, since two ends that both pause could wait for each other.
    overflow: "close" aborts the connection with OutboxFull; "drop" discards the message and counts it; "raise" raises
        OutboxFull.
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
    """The timeouts of one connection, in seconds; None is no timeout.

    idle: no message has arrived. Pieces of an unfinished message do not count, so a peer that sends a byte now and then
        is idle. A peer that sends large messages slowly needs a longer timeout.
    write: the outbox is not empty, and the peer accepts none of it (at most 30 s while closing).
    silence: no byte has moved in either direction. A peer that reads a long download is idle, but not silent.
        `on_close` gets IdleTimeout, as for `idle`.
    connect: `Mux.connect`, from the lookup of the name to the connected socket. A later change has no effect.
    handshake: from the connected socket (or the end of the PROXY header) to the end of a TLS handshake; for a PROXY
        header, 5 seconds at most, also if this is None. `on_close` gets HandshakeTimeout.
    linger: a closing connection has sent all output, and the peer has not sent its FIN.

    The clocks of `idle` and `silence` stop while `pause_reading` is in effect, and while messages of the connection are
    in the threads of a Threaded.
    """

    __slots__ = ("idle", "write", "connect", "linger", "silence", "handshake")  # noqa: RUF023 -- as in repr

    idle: float | None
    write: float | None
    connect: float | None
    linger: float
    silence: float | None
    handshake: float | None

    def __init__(
        self,
        *,
        idle: float | None = None,
        write: float | None = None,
        connect: float | None = 30.0,
        linger: float = 5.0,
        silence: float | None = None,
        handshake: float | None = 10.0,
    ) -> None:
        self._set(
            idle=_check_limit("idle", idle),
            write=_check_limit("write", write),
            connect=_check_limit("connect", connect),
            linger=check_seconds("linger", linger),
            silence=_check_limit("silence", silence),
            handshake=_check_limit("handshake", handshake),
        )


def _check_limit(name: str, value: float | None) -> float | None:
    if value is None:
        return None
    seconds = check_seconds(name, value)
    if seconds == 0:
        raise ValueError(f"{name} must be > 0 or None, not {seconds}")
    return seconds


def _as_settings(name: str, value: object, cls: type[S]) -> S:
    if value is None:
        return cls()
    if isinstance(value, cls):
        return value
    if value is cls:
        raise TypeError(f"{name} must be an instance, not the class: pass {cls.__name__}(...)")
    raise TypeError(f"{name} must be a muxcore.{cls.__name__} or None, not {type(value).__name__}")


def as_limits(value: object) -> Limits:
    """`value`, or the defaults for None; TypeError for anything else."""
    return _as_settings("limits", value, Limits)


def as_timeouts(value: object) -> Timeouts:
    """`value`, or the defaults for None; TypeError for anything else."""
    return _as_settings("timeouts", value, Timeouts)
