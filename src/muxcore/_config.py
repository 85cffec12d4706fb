"""What may live here: the frozen settings of a connection (Limits, Timeouts), checked when they are made.

Plain Python: they are read once per listener, when its policy is compiled, never per message.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Overflow = Literal["close", "drop", "raise"]


def check_int(name: str, value: object, minimum: int, maximum: int = 1 << 62) -> int:
    """Return `value` if it is an int in that range; else raise TypeError or ValueError naming the argument."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be >= {minimum}, not {value}")
    if value > maximum:
        raise ValueError(f"{name} must be <= {maximum}, not {value}")
    return value


def check_seconds(name: str, value: object) -> float:
    """Return `value` if it is a finite number of seconds >= 0; else raise TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number of seconds, not {type(value).__name__}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number of seconds >= 0, not {value}")
    return value


def to_ns(seconds: float) -> int:
    """Nanoseconds, at least one unless it is 0. Half a year is for ever here, so that sums fit into 64 bits."""
    return max(int(min(seconds, 1.6e7) * 1e9), seconds > 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one connection may keep in memory, in bytes.

    high, low: water marks of the outbox. `send` answers False above `high`; `on_drain` comes once it is back at `low`.
    max_outbox: a message is accepted while the outbox is below this; beyond it, `overflow` decides.
    max_inbox: a connection whose undelivered input exceeds this is not read from.
    autopause: do not read from, nor deliver to, a connection that is above `high`. None: on for accepted and attached
        connections, off for those made by `connect`, since two such ends could wait for each other.
    overflow: "close" aborts the connection with OutboxFull; "drop" counts and drops the message; "raise" raises.
    """

    high: int = 65536
    low: int = 16384
    max_outbox: int = 16 * 1024 * 1024
    max_inbox: int = 1024 * 1024
    autopause: bool | None = None
    overflow: Overflow = "close"

    def __post_init__(self) -> None:
        check_int("low", self.low, 0)
        check_int("high", self.high, 0)
        check_int("max_outbox", self.max_outbox, 1)
        check_int("max_inbox", self.max_inbox, 1)
        if self.low > self.high:
            raise ValueError(f"low must be <= high, not {self.low} > {self.high}")
        if self.high > self.max_outbox:
            raise ValueError(f"high must be <= max_outbox, not {self.high} > {self.max_outbox}")
        if self.autopause is not None and not isinstance(self.autopause, bool):
            raise TypeError(f"autopause must be True, False or None, not {self.autopause!r}")
        if self.overflow not in get_args(Overflow):
            raise ValueError(f"overflow must be one of {get_args(Overflow)}, not {self.overflow!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """How long one connection may take, in seconds; None is for ever.

    idle: no message has come. The pieces of an unfinished one do not count, so who sends a byte now and then cannot
        stay; who sends large messages slowly needs a longer timeout.
    write: the outbox is not empty and the peer takes nothing of it (at most 30 s while closing).
    connect: `Mux.connect`, from the name's resolution to the open connection. (Set later, it changes nothing.)
    linger: how long a closing connection whose output is all sent waits for the peer's FIN.
    """

    idle: float | None = None
    write: float | None = None
    connect: float | None = 30.0
    linger: float = 5.0

    def __post_init__(self) -> None:
        for name in ("idle", "write", "connect"):
            value = getattr(self, name)
            if value is not None and check_seconds(name, value) == 0:
                raise ValueError(f"{name} must be > 0 or None, not {value}")
        check_seconds("linger", self.linger)


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
