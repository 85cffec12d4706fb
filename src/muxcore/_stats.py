"""What may live here: Stats, the counters of a Mux as the user reads them."""

from __future__ import annotations

from ._typing import NamedTuple


class Stats(NamedTuple):
    """Plain counters since the Mux was made; reading them takes no lock and changes nothing."""

    waits: int
    """Turns of the loop that called the kernel for events."""
    events: int
    """Events that the kernel reported."""
    stale_events: int
    """Events that were dropped: their descriptor was closed, and perhaps reused, earlier in the same batch."""
    accepts: int
    """Connections accepted."""
    accept_pauses: int
    """How often a listener paused: no descriptors, no memory, or `max_connections` reached."""
    recv_calls: int
    """Calls of recv(2) on connections."""
    send_calls: int
    """Calls of send(2), sendfile(2) and, on datagram sockets, sendto(2) or sendmmsg(2)."""
    sendmsg_calls: int
    """Calls of sendmsg(2), each with several pieces of output."""
    bytes_in: int
    """Bytes received, of connections and datagrams."""
    bytes_out: int
    """Bytes that the kernel accepted for sending."""
    messages_in: int
    """Messages delivered to a handler or returned by `recv`; datagrams delivered."""
    messages_out: int
    """Messages and datagrams accepted for sending."""
    would_blocks: int
    """How often a socket's send buffer was full."""
    high_water_hits: int
    """How often a connection went above its high-water mark."""
    drops: int
    """Messages refused because the connection was closing or closed, or its outbox full; datagrams cut or not sent."""
    timeouts: int
    """Connections that a timeout ended: idle, silence, write or connect."""
    wakeups: int
    """How often another thread ended a wait."""
    handler_errors: int
    """Exceptions that callbacks raised, those of timers and calls included."""
    connections: int
    """Connections open now."""
    peak_connections: int
    """The most connections that were open at once."""
    unsent: int
    """Connections and datagram sockets that ended with output unsent."""
    datagram_errors: int
    """Errors that the network, or the kernel for a single datagram, reported to datagram sockets."""
    handshake_failures: int
    """Connections that ended before they were open: a TLS handshake or a PROXY header that failed or took too long."""
