"""What may live here: what a wire is: the seam between a connection's socket and its framer, for both cores.

A wire knows neither sockets nor connections ("sans I/O"). TLS is one (tls.py), the PROXY protocol another
(proxy_protocol.py).
"""

from __future__ import annotations

from ._typing import TYPE_CHECKING
from .errors import from_call

if TYPE_CHECKING:
    import ssl

    from .proxy_protocol import Proxy


class Wire:
    """What turns the bytes of a socket into the bytes of a framer, and back, for one connection.

    Its core appends to `received`, and then calls `advance`; what that appends to `plain` goes to the framer. Its core
    puts plaintext of the outbox into `given`, and calls `encrypt`. What either of them appends to `output` goes to the
    socket, in this order, and in front of plaintext that comes later.

    A method may raise: an Exception ends the connection, which gets it as `error`, after the output has been sent. An
    interrupt (KeyboardInterrupt) leaves a wire such that the next call of the same method goes on: bytes are taken off
    a list in the line in which they are kept elsewhere.
    """

    __slots__ = ("ended", "given", "opened", "output", "over", "plain", "proxy", "received", "successor")

    tls: ssl.SSLObject | None = None
    speaks_first: bool = True  # it may have output before anything was received
    step: str = "handshake"  # what it does until it is opened or over ...
    limit_ns: int = 0  # ... and a limit to the time for that, beside Timeouts.handshake; 0: none

    def __init__(self) -> None:
        self.received: list[bytes] = []
        self.plain: list[bytes] = []
        self.output: list[bytes] = []
        self.given: bytes | memoryview | None = None
        self.opened: bool = False  # the handshake is done: on_open may come, and plaintext may be sent
        self.ended: bool = False  # the peer has ended its side of the stream, before the socket's FIN
        self.over: bool = False  # it has nothing more to do: `successor`, or else the framer, gets what comes
        self.successor: Wire | None = None
        self.proxy: Proxy | None = None

    def advance(self) -> None:
        """Work through `received`; before anything was received, too, if it speaks first."""
        raise NotImplementedError

    def encrypt(self) -> None:
        """Turn `given` into output, and set it to None. Only once it is opened."""
        raise NotImplementedError

    def finish(self) -> None:
        """Append the last output. Nothing is given after it."""

    def eof(self) -> Exception | None:
        """The socket's FIN was read: why this is not the stream's end, or None."""
        return None


def check_is_its_own(wire: Wire, error: Exception) -> None:
    """Raise what a signal handler has raised: the wire goes on. (A user's SSLObject may raise anything itself.)"""
    is_ours = type(wire).__module__.startswith("muxcore.") and (wire.tls is None or type(wire.tls).__module__ == "ssl")
    if is_ours and not from_call(error):
        raise error
