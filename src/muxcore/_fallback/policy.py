"""What may live here: a handler and its settings, of one connection or of all that a listener accepts."""

from __future__ import annotations

from .._config import to_ns
from .._typing import TYPE_CHECKING
from ..handler import Callbacks

if TYPE_CHECKING:
    from typing import Any

    from .._config import Limits, Timeouts
    from .._wiring import Wiring
    from .listener import Listener

CLOSING_STALL_NS = 30_000_000_000
FAILED_LINGER_NS = 500_000_000


class Policy:
    """A handler and its settings."""

    __slots__ = (*Callbacks._fields, "autopause", "callbacks", "framer", "half_open", "handler", "handshake_ns",
                 "idle_ns", "limits", "linger_ns", "listener", "outbound", "pull", "silence_ns", "timeouts", "wiring",
                 "write_ns")

    def __init__(
        self,
        handler: object,
        callbacks: Callbacks,
        limits: Limits,
        timeouts: Timeouts,
        half_open: bool,
        framer: Any,
        outbound: bool,
        wiring: Wiring | None,
    ) -> None:
        if hasattr(handler, "_native_callbacks"):
            raise TypeError("handler: a NativeHandler needs the epoll backend, whose core is compiled")
        self.on_open, self.on_message, self.on_messages = callbacks[:3]
        self.on_drain, self.on_eof, self.on_error, self.on_close = callbacks[3:]
        self.handler, self.callbacks = handler, callbacks
        self.pull = handler is None
        self.half_open = half_open
        self.outbound = outbound
        self.wiring: Any = wiring
        self.listener: Listener | None = None
        self.limits = limits
        self.timeouts = timeouts
        self.framer = framer
        self.autopause = not self.outbound if limits.autopause is None else limits.autopause
        self.linger_ns = to_ns(timeouts.linger)
        self.idle_ns = to_ns(timeouts.idle or 0)
        self.write_ns = to_ns(timeouts.write or 0)
        self.silence_ns = to_ns(timeouts.silence or 0)
        self.handshake_ns = to_ns(timeouts.handshake or 0)

    def changed(self, limits: Limits, timeouts: Timeouts, framer: Any) -> Policy:
        """The same policy with other settings, for one connection alone."""
        other = Policy(
            self.handler, self.callbacks, limits, timeouts, self.half_open, framer, self.outbound, self.wiring
        )
        other.listener = self.listener
        return other

    @property
    def closing_stall_ns(self) -> int:
        return min(self.write_ns or CLOSING_STALL_NS, CLOSING_STALL_NS)
