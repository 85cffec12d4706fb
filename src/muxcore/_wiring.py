"""What may live here: which wires a connection begins with, and the arguments that say so."""

from __future__ import annotations

from ._typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl
    from typing import Any

    from ._wire import Wire
    from .proxy_protocol import Networks


class Wiring:
    """The wires that the connections of a listener, or of one `connect`, begin with."""

    def __init__(
        self, tls: ssl.SSLContext | None, server_hostname: str | None, server_side: bool, networks: Networks | None
    ) -> None:
        self.tls, self.server_hostname, self.server_side, self.networks = tls, server_hostname, server_side, networks

    def make(self, peer: Any) -> Wire:
        wire: Wire | None = None
        if self.tls is not None:
            from .tls import TLSWire  # here and below: most programs need no ssl

            wire = TLSWire(self.tls, self.server_side, self.server_hostname)
        if self.networks is None:
            assert wire is not None
            return wire
        from .proxy_protocol import ProxyWire

        return ProxyWire(self.networks, peer, wire)


def listening(tls: object, proxy_protocol: object) -> Wiring | None:
    """The wiring of a listener; TypeError or ValueError for a bad argument."""
    if tls is False:
        tls = None
    if tls is None and proxy_protocol is None:
        return None
    networks = None
    if proxy_protocol is not None:
        from .proxy_protocol import Networks

        networks = Networks(proxy_protocol)
    return Wiring(None if tls is None else as_context(tls, server_side=True), None, True, networks)


def connecting(tls: object, server_hostname: object, address: object) -> Wiring | None:
    """The wiring of an outgoing connection; TypeError or ValueError for a bad argument."""
    if tls is None or tls is False:
        if server_hostname is not None:
            raise ValueError("server_hostname needs tls=")
        return None
    if tls is True:
        import ssl

        tls = ssl.create_default_context()
    context = as_context(tls, server_side=False)
    if server_hostname is None and isinstance(address, tuple):
        server_hostname = address[0]
    return Wiring(context, as_hostname(server_hostname, context), False, None)


def tls_wire(context: object, server_side: object, server_hostname: object, side: bool | None) -> Wire:
    """For `Connection.start_tls`. side: whether its core knows the connection to be the server's end; None: it does
    not."""
    if server_side is None:
        server_side = side
    if server_side is None:
        raise ValueError("server_side is required: attach() does not know which end this is")
    if not isinstance(server_side, bool):
        raise TypeError(f"server_side must be True, False or None, not {server_side!r}")
    if server_side and server_hostname is not None:
        raise ValueError("server_hostname is for the client's side")
    checked = as_context(context, server_side, "context")
    from .tls import TLSWire

    return TLSWire(checked, server_side, None if server_side else as_hostname(server_hostname, checked))


def as_context(value: object, server_side: bool, name: str = "tls") -> ssl.SSLContext:
    """`value`, if it can be used on that side; else TypeError or ValueError."""
    import ssl

    if not isinstance(value, ssl.SSLContext):
        accepted = "an ssl.SSLContext" if server_side or name != "tls" else "an ssl.SSLContext or True"
        raise TypeError(f"{name} must be {accepted}, not {type(value).__name__}")
    wrong = ssl.PROTOCOL_TLS_CLIENT if server_side else ssl.PROTOCOL_TLS_SERVER
    if value.protocol == wrong:
        side, other = ("server", "client") if server_side else ("client", "server")
        raise ValueError(f"{name} is a context for a {other}: a {side} needs ssl.PROTOCOL_TLS_{side.upper()}")
    return value


def as_hostname(value: object, context: ssl.SSLContext) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"server_hostname must be a str or None, not {type(value).__name__}")
    if not value and context.check_hostname:
        raise ValueError("server_hostname is required: the context checks the host name of the certificate")
    if value and (value.startswith(".") or "\0" in value or not _has_labels(value)):
        raise ValueError(f"server_hostname must be a host name, not {value!r}")
    return value or None


def _has_labels(name: str) -> bool:
    try:
        name.encode("idna")  # as ssl does
    except UnicodeError:
        return False
    return True


def change_context(wiring: Wiring | None, context: object) -> None:
    """For `Listener.tls`."""
    if wiring is None or wiring.tls is None:
        raise ValueError("tls: the listener was made without TLS")
    wiring.tls = as_context(context, server_side=True)
