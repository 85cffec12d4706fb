"""What may live here: Stats, the counters of a Mux as the user reads them."""

from __future__ import annotations

from ._typing import NamedTuple, explain


class Stats(NamedTuple):
    """Plain counters since the Mux was made; reading them takes no lock and changes nothing."""

    waits: int
    events: int
    stale_events: int
    accepts: int
    accept_pauses: int
    recv_calls: int
    send_calls: int
    sendmsg_calls: int
    bytes_in: int
    bytes_out: int
    messages_in: int
    messages_out: int
    would_blocks: int
    high_water_hits: int
    drops: int
    timeouts: int
    wakeups: int
    handler_errors: int
    connections: int
    peak_connections: int
    unsent: int
    datagram_errors: int
    handshake_failures: int


explain(Stats, {
    "waits": "Turns of the loop that called the kernel for events.",
    "events": "Events that the kernel reported.",
    "stale_events": "Events that were dropped: their descriptor was closed, and perhaps reused, earlier in the batch.",
    "accepts": "Connections accepted.",
    "accept_pauses": "How often a listener paused: no descriptors, no memory, or `max_connections` reached.",
    "recv_calls": "Calls of recv(2) on connections.",
    "send_calls": "Calls of send(2), sendfile(2) and, on datagram sockets, sendto(2) or sendmmsg(2).",
    "sendmsg_calls": "Calls of sendmsg(2), each with several pieces of output.",
    "bytes_in": "Bytes received, of connections and datagrams.",
    "bytes_out": "Bytes that the kernel accepted for sending.",
    "messages_in": "Messages delivered to a handler or returned by `recv`; datagrams delivered.",
    "messages_out": "Messages and datagrams accepted for sending.",
    "would_blocks": "How often a socket's send buffer was full.",
    "high_water_hits": "How often a connection went above its high-water mark.",
    "drops": "Messages refused as the connection was closing or closed, or its outbox full; datagrams cut or not sent.",
    "timeouts": "Connections that a timeout ended: idle, silence, write, connect or handshake.",
    "wakeups": "How often another thread ended a wait.",
    "handler_errors": "Exceptions that callbacks raised, those of timers and calls included.",
    "connections": "Connections open now.",
    "peak_connections": "The most connections that were open at once.",
    "unsent": "Connections and datagram sockets that ended with output unsent.",
    "datagram_errors": "Errors that the network, or the kernel for a single datagram, reported to datagram sockets.",
    "handshake_failures": "Connections whose TLS handshake or PROXY header failed or took too long.",
})
