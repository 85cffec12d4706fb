"""muxcore: one Python thread, tens of thousands of sockets, at the speed of C.

The public names. Nothing inside the package imports this file.
"""

from ._config import Limits, Timeouts
from ._impl import CLOSED, DRAINED, EOF, OPENED, READABLE, Connection, Datagram, Epoll, Listener, Mux, TimerHandle
from ._stats import Stats
from ._unix import PeerCredentials
from .errors import (
    ConnectionClosed,
    ConnectTimeout,
    FrameError,
    FrameTooLarge,
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
    "Delimiter",
    "Epoll",
    "Fixed",
    "FrameError",
    "FrameTooLarge",
    "Framer",
    "Handler",
    "IdleTimeout",
    "LengthPrefix",
    "Limits",
    "Lines",
    "Listener",
    "Mux",
    "MuxError",
    "OutboxFull",
    "PeerCredentials",
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
