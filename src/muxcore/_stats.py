"""What may live here: Stats, the counters of a Mux as the user reads them."""

from __future__ import annotations

from ._typing import NamedTuple


class Stats(NamedTuple):
    """Plain counters since the Mux was made; reading them takes no lock and changes nothing."""

    waits: int
    """Turns of the loop that asked the kernel for events."""
    events: int
    stale_events: int
    """Events for a descriptor that had been closed, and perhaps reused, earlier in the same batch: dropped."""
    accepts: int
    accept_pauses: int
    """How often a listener had to rest: no descriptors, no memory, or `max_connections` reached."""
    recv_calls: int
    send_calls: int
    sendmsg_calls: int
    bytes_in: int
    bytes_out: int
    messages_in: int
    """Messages handed to a handler or taken by `recv`."""
    messages_out: int
    """Messages accepted for sending."""
    would_blocks: int
    """How often a socket's send buffer was full."""
    pauses: int
    """How often a connection was above its high-water mark."""
    drops: int
    """Messages refused: the connection was closing, closed or its outbox full; datagrams that were cut or not sent."""
    timeouts: int
    wakeups: int
    handler_errors: int
    connections: int
    """Open now."""
    peak_connections: int
    unsent: int
    """Connections and datagram sockets that ended with output unsent."""
    datagram_errors: int
    """What datagram sockets were told by the network, or by the kernel about a single datagram."""
