"""What may live here: what help() says of the fallback's classes.

tests/fallback_docs.py writes this file. The texts are those of the compiled classes, and a test compares the two.
"""

from __future__ import annotations

from types import MemberDescriptorType

from .._typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any, TypeVar

    T = TypeVar("T")


def documented(kind: type[T]) -> type[T]:
    """A decorator: the class with the texts of its members."""
    for name, text in TEXTS[kind.__name__].items():
        member: Any = getattr(kind, name) if name else kind
        if not isinstance(member, MemberDescriptorType):  # a slot has none: the text of its class does
            member.__doc__ = text
    return kind


TEXTS: dict[str, dict[str, str]] = {
    "Connection": {
        "": """\
A connected stream socket, with a bounded queue of messages in each direction.

Made by a Listener, by `Mux.connect` or by `Mux.attach`. Its methods never block and never call a callback. Any
thread may use `send`, `send_many`, `write`, `writelines`, `close`, `abort`, `id`, `peer`, `closing`, `closed` and
`data`. Use anything else in the Mux's thread only: most methods raise RuntimeError in another thread.

id: its number, which is never reused. data: yours, None at first. error: the exception that ended it, or None.""",
        "abort": """\
Reset the connection now (RST), and discard the outbox. `on_close` is called in the next turn.""",
        "close": """\
Send all queued output, then a FIN; wait for the peer's FIN (`Timeouts.linger`); close.

reason: the exception that `on_close` gets; None is an orderly end.

From now on no message is delivered, and none is accepted. Input is read and discarded: unread input would make
the kernel send a RST, which could destroy the last output. A connection that is still connecting continues only
if output is queued. No effect on a closing connection. Raises TypeError for a reason that is no exception.""",
        "closed": """\
Whether it has ended and its descriptor is closed.""",
        "closing": """\
Whether `close` was called or the connection has ended. Output is refused from then on.""",
        "data": """\
For your state of this connection; None at first. Any thread may use it.""",
        "detach": """\
Remove the socket from the Mux and return it, nonblocking. The connection ends with `on_close(conn, None)`.

Read `unread` before it, and `flush`. Raises RuntimeError while output is queued, ConnectionClosed if the
connection is not open.""",
        "eof": """\
Whether the peer's FIN was read.""",
        "fileno": """\
The descriptor; -1 before the connection is open and after it is closed.""",
        "flush": """\
Send as much of the outbox as the kernel accepts now; returns the number of bytes that remain queued.

It is seldom needed: the output of a handler leaves when the handlers of its group have returned, which is up to
sixteen events of a batch (compiled core).""",
        "framer": """\
The framer. It may be set at any moment: the new framer gets every byte that was not delivered yet (in
`on_messages`: every byte after those of the list).""",
        "getsockopt": """\
As `socket.getsockopt`.""",
        "inbox_size": """\
Bytes received and not yet delivered.""",
        "is_reading": """\
Whether muxcore reads from it now. False while it is paused (by you, by autopause or by a full inbox), at EOF
or closing.""",
        "limits": """\
The memory bounds of this connection. Settable.""",
        "listener": """\
The Listener that accepted it; None if it was not accepted.""",
        "local": """\
The local address, as `socket.getsockname` returns it; None before it is open and after it is closed.""",
        "mux": """\
The Mux that serves it.""",
        "outbox_size": """\
Bytes accepted by `send` and not yet accepted by the kernel.""",
        "pause_reading": """\
Stop reading and delivery at once. The kernel's buffers fill up, and then the peer cannot send.""",
        "peer": """\
The peer's address, as `socket.getpeername` gives it, or, until `connect` has found it, as it was given; it
stays valid after the end.""",
        "peer_credentials": """\
The process at the other end of a Unix connection: its pid, uid and gid as they were when it connected.

Raises ValueError if this is no Unix connection, or if the system has no SO_PEERCRED (Linux has it), and
ConnectionClosed once closed.""",
        "proxy": """\
What a load balancer's PROXY header said (see `muxcore.proxy_protocol.Proxy`); None without one.""",
        "recv": """\
The next queued message (pull style); `default` if there is none, or while the connection is paused.

Unlike `socket.recv` it has no size argument: the framer decides where a message ends.""",
        "recv_all": """\
A list of all queued messages (pull style).""",
        "resume_reading": """\
Undo `pause_reading`.""",
        "send": """\
Queue a message with its framing; True while the outbox is at or below `Limits.high`.

`bytes` are kept by reference; any other buffer is copied before this returns. It never blocks, and never raises
because of the peer: on a closing or closed connection it counts a drop and returns False. At `max_outbox`,
`Limits.overflow` decides. Raises TypeError for a type that the framer cannot send (bytes-like, except with Resp
or a framer of your own), ValueError for a message that the peer could not parse as one (a newline with Lines).""",
        "send_many": """\
`send` each message of an iterable; returns what the last `send` returns.""",
        "sendfile": """\
Queue a part of a regular file after what is queued already; returns what `send` returns.

file: a file object or a descriptor, open for reading; you may close it as soon as this returns.
offset: bytes of the file before the part.
count: bytes of the part; None is up to the end of the file.

A part of at most 64 KiB is read at once, and counts as if `write` had sent it. A larger part stays in the file
until it is sent, with a descriptor of its own. Its bytes count for the water marks, but not for `max_outbox`,
since they use no memory. A connection keeps at most 32 such parts; `Limits.overflow` decides about the next. If
the file has become too short when the part is due, the connection is reset.

A file that reports a size of 0, as in /proc, is read at once. It may have at most 1 MiB.

Raises TypeError or ValueError if the file is not a regular one, is not open for reading or does not have the
whole part, and OSError if the system cannot read it.""",
        "set_limits": """\
Change some limits of this connection: `conn.set_limits(high=4096, low=1024)`.""",
        "set_timeouts": """\
Change some timeouts of this connection: `conn.set_timeouts(idle=5.0)`.""",
        "setsockopt": """\
As `socket.setsockopt`. Raises ValueError for SO_LINGER with a time, with which close(2) would stop the loop:
`Timeouts.linger` is that time here.""",
        "start_tls": """\
Begin TLS on an open connection, as after STARTTLS of SMTP: the handshake follows.

context: an `ssl.SSLContext`.
server_side: whether this is the server's end. None: True for an accepted connection, False for one that
    `connect` made. Required for an attached one.
server_hostname: the name that the server's certificate must have, if the context checks it, and that SNI sends.

Output that was queued before is sent in plaintext; output from now on waits for the handshake. Bytes that were
received and not delivered yet belong to TLS: plaintext that a peer has sent behind its STARTTLS never counts as
a command. A failed handshake ends the connection with an `ssl.SSLError`.

Raises ConnectionClosed if the connection is not open, RuntimeError if it has TLS already or its framer's
`feed` is running (as a signal handler may find it), TypeError or ValueError for a bad argument.""",
        "timeouts": """\
The timeouts of this connection. Settable.""",
        "tls": """\
The `ssl.SSLObject` of a connection with TLS, for `version()`, `cipher()`, `getpeercert()`,
`selected_alpn_protocol()` and `session`; None without TLS, and after `on_close`.""",
        "unread": """\
The bytes received and not yet delivered, unframed. They stay in the inbox.""",
        "write": """\
Queue bytes without framing; otherwise as `send`.""",
        "write_eof": """\
Half-close: send a FIN once the outbox is empty. Input continues; further output is refused.""",
        "writelines": """\
`write` each element of an iterable; returns what the last `write` returns.""",
    },
    "Datagram": {
        "": """\
A datagram socket, UDP or Unix; made by `Mux.datagram`. Its methods never block and never call a callback.

Use it from the Mux's thread only.

address: its local address, as `socket.getsockname` returns it; with port 0 as argument, it has the actual port.
remote: the address that it is connected to, or None. limits: those of the output queue. mux: its Mux. closed:
whether it is closed. data: yours, None at first.""",
        "close": """\
Send as much as the kernel accepts at once, drop the remaining output, and close. No callback follows.""",
        "fileno": """\
The descriptor; -1 after it is closed.""",
        "getsockopt": """\
As `socket.getsockopt`.""",
        "send": """\
Queue a datagram; True while the queue is at or below `Limits.high`. It is sent at the end of the batch.

address: the destination, with a numeric host; None, or the remote, on a socket with a remote.

`bytes` are kept by reference; any other buffer is copied before this returns. It never blocks, and never raises
because of the network. On a closed socket, and for a sender that cannot get a reply (port 0, or None for an
unbound Unix socket), it counts a drop and returns False. At `max_outbox`, `Limits.overflow` decides. Raises
TypeError or ValueError for a bad address, or for more data than a datagram can hold.""",
        "setsockopt": """\
As `socket.setsockopt`.""",
    },
    "Listener": {
        "": """\
A listening socket; made by `Mux.listen`.

address: its address, as `socket.getsockname` returns it; with port 0 as argument, it has the actual port.
connections: the number of open connections that it accepted.""",
        "close": """\
Stop listening. Accepted connections stay open; the kernel resets those in the backlog.""",
        "closed": """\
Whether it is closed.""",
        "dup": """\
A new `socket.socket` for the same listening socket, for example to pass it to another process.

It is nonblocking, because both share one mode (`socket.dup` would make both blocking), and not inheritable (see
`pass_fds` of `subprocess.Popen`). It listens until you close it, also after `close` of this Listener. But if
`listen` created a Unix socket from a path, that `close` removes the file, and clients cannot find the socket.

Raises ConnectionClosed if the Listener is closed, OSError if no descriptor is left.""",
        "fileno": """\
The descriptor; -1 after it is closed.""",
        "mux": """\
The Mux that accepts for it.""",
        "tls": """\
The `ssl.SSLContext` of new connections; None without TLS. Set another one to rotate certificates: open
connections keep theirs. A listener that began without TLS has none; setting it raises ValueError.""",
    },
    "NativeHandler": {
        "": """\
A handler whose callbacks are C functions: subclass it in Cython, with `from muxcore cimport NativeHandler`.

The callbacks are those of `Handler`, as `cdef` methods; override those that you need. The loop calls them without a
call of Python. A method that a Python subclass defines under one of these names is called in its place.

Raises TypeError without the compiled core; backends other than "epoll" refuse it.""",
    },
    "PythonCore": {
        "backend": """\
The readiness call that it waits with: "epoll", "poll", "select" or "kqueue".""",
        "close": """\
Flush every connection once without blocking, abort those with output left, and release all resources.

Inside a callback it is done when the callback returns. In a forked child it only closes the descriptors. If the
Mux's thread has ended, any thread may call it, and `on_close` is called in that thread.""",
        "closed": """\
Whether `close` was called.""",
        "fileno": """\
The epoll descriptor, for another loop to watch: it is readable whenever `poll(0)` has work to do.

After the first call, `send` outside of callbacks sends at once, and does not wait for the next `poll`.""",
        "poll": """\
Run one turn of the loop: wait up to `timeout` seconds (None: without limit) for events, and handle them.

Returns [(connection, flags), ...] for connections without a handler; the flags (OPENED, READABLE, DRAINED, EOF,
CLOSED) may be combined. The list is empty at the timeout, and when only callbacks ran.""",
        "stats": """\
The current counters. Any thread may call it.""",
        "stop": """\
Make `run` return after the current batch; if it is not running, the next `run`. Any thread may call it.""",
    },
}
