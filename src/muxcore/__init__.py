"""muxcore: one Python thread, tens of thousands of sockets, at the speed of C.

The public names. Nothing inside the package imports this file.
"""

from . import _impl
from ._config import Limits, Timeouts
from ._impl import Epoll, Mux, TimerHandle
from ._stats import Stats
from ._typing import TYPE_CHECKING
from ._unix import PeerCredentials
from .errors import (
    ConnectionClosed,
    ConnectTimeout,
    FrameError,
    FrameTooLarge,
    HandshakeTimeout,
    IdleTimeout,
    MuxError,
    OutboxFull,
    WriteTimeout,
)
from .framing import Delimiter, Fixed, Framer, LengthPrefix, Lines, Resp, RespError
from .handler import Handler
from .selectors import Selector
from .server import serve
from .threads import Threaded

if TYPE_CHECKING or _impl.core == "compiled":
    from ._impl import Connection, Datagram, Listener, NativeHandler
if TYPE_CHECKING:
    from ._protocols import DatagramHandlerLike, HandlerLike
    from ._report import CLOSED, DRAINED, EOF, OPENED, READABLE, Report
else:

    def __getattr__(name: str) -> object:
        value = globals()[name] = _impl.__getattr__(name)
        return value

__all__ = [
    "CLOSED",
    "DRAINED",
    "EOF",
    "OPENED",
    "READABLE",
    "ConnectTimeout",
    "Connection",
    "ConnectionClosed",
    "Datagram",
    "DatagramHandlerLike",
    "Delimiter",
    "Epoll",
    "Fixed",
    "FrameError",
    "FrameTooLarge",
    "Framer",
    "Handler",
    "HandlerLike",
    "HandshakeTimeout",
    "IdleTimeout",
    "LengthPrefix",
    "Limits",
    "Lines",
    "Listener",
    "Mux",
    "MuxError",
    "NativeHandler",
    "OutboxFull",
    "PeerCredentials",
    "Report",
    "Resp",
    "RespError",
    "Selector",
    "Stats",
    "Threaded",
    "Timeouts",
    "TimerHandle",
    "WriteTimeout",
    "serve",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
