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
One connected stream socket: a queue of messages in, and a queue of messages out.

Made by a Listener, by `Mux.connect` or by `Mux.attach`. Its methods never block and never call a callback. `send`,
`send_many`, `write`, `writelines`, `close`, `abort`, `id`, `peer`, `closing` and `closed` may be used from any
thread; anything else raises RuntimeError outside the Mux's thread.

id: its number, never used again. data: yours. error: why it ended, an exception or None.""",
        "abort": """\
Reset the connection now; what is queued is lost.""",
        "close": """\
Send everything accepted so far, then a FIN, then wait for the peer's (`Timeouts.linger`), then close.

reason: the exception that `on_close` gets; None is an orderly end.

Nothing is delivered or accepted from now on; input is read and discarded, since unread input would turn the
end into a reset and destroy output on its way. One that is still connecting goes on with that only if there is
something to send. No effect on a closing connection. Raises TypeError for a reason that is no exception.""",
        "closed": """\
Whether it is over and its descriptor closed.""",
        "closing": """\
Whether `close` was called or the connection is over; nothing is accepted for sending any more.""",
        "data": """\
Yours; for any thread.""",
        "detach": """\
Give the socket away, nonblocking, and end here with `on_close(conn, None)`; see `unread` and `flush` first.

Raises RuntimeError while there is unsent output, ConnectionClosed if the connection is not open.""",
        "eof": """\
Whether the peer's FIN was read.""",
        "fileno": """\
The descriptor; -1 until it is open and once it is closed.""",
        "flush": """\
Send what the kernel takes now; how many bytes are still queued.

What a handler sends goes out by itself, when it and those of up to fifteen events that came with its own are
done.""",
        "framer": """\
How bytes are cut into messages. Set it in the middle, to upgrade the protocol: everything that is not
delivered yet is for the new one (in `on_messages`: everything behind the list).""",
        "getsockopt": """\
As `socket.getsockopt`.""",
        "inbox_size": """\
Bytes received and not delivered.""",
        "is_reading": """\
Whether it is read from now: not paused, held back by its own output, full, at EOF or closing.""",
        "limits": """\
What this connection may keep in memory. Settable.""",
        "listener": """\
The Listener that accepted it; None if it was not accepted.""",
        "local": """\
Our own address, as `socket.getsockname` gives it; None until it is open and once it is closed.""",
        "mux": """\
The Mux that serves it.""",
        "outbox_size": """\
Bytes accepted for sending that the kernel has not taken yet.""",
        "pause_reading": """\
Stop reading and delivering, at once. The kernel's buffers fill up and the peer has to wait.""",
        "peer": """\
The peer's address, as `socket.getpeername` gives it, or, until `connect` has found it, as it was given; it
stays valid after the end.""",
        "peer_credentials": """\
The process at the other end of a Unix connection: its pid, uid and gid as they were when it connected.

Raises ValueError if this is no Unix connection, or the system does not tell (SO_PEERCRED: Linux), and
ConnectionClosed once closed.""",
        "recv": """\
The next queued message; `default` when there is none, or while the connection is paused.""",
        "recv_all": """\
All queued messages.""",
        "resume_reading": """\
Go on with what `pause_reading` has stopped.""",
        "send": """\
Queue a message, and what the framer puts around it; True while the outbox is at or below `Limits.high`.

`bytes` are kept by reference, any other buffer is copied before this returns. Never blocks, and never raises
because of the peer: on a closing or closed connection it counts a drop and returns False. Beyond `max_outbox`
`Limits.overflow` decides. Raises TypeError for what the framer cannot send (without one, and with most, it must
be bytes-like), ValueError for what the peer could not read as one message.""",
        "send_many": """\
`send` each; the last answer.""",
        "sendfile": """\
Queue a part of a regular file, behind what is queued already; returns what `send` returns.

file: a file object or a descriptor, open for reading; you may close it as soon as this returns.
offset: bytes of the file before the part.
count: bytes of the part; None is up to the end of the file.

A part of at most 64 KiB is read at once, and counts as if `write` had sent it. A larger part stays in the file
until its turn comes, with a descriptor of its own. Its bytes count for the water marks, but not for
`max_outbox`, since they take no memory; a connection keeps 32 such parts, and `Limits.overflow` decides about
the next. If the file is too short when the turn of the part comes, the connection is reset.

A file that reports a size of 0, as those of /proc do, is read at once. It may have at most 1 MiB.

Raises TypeError or ValueError if the file is not a regular one, is not open for reading or does not have the
whole part, and OSError if the system cannot read it.""",
        "set_limits": """\
Change some of the limits of this connection alone.""",
        "set_timeouts": """\
Change some of the timeouts of this connection alone.""",
        "setsockopt": """\
As `socket.setsockopt`. Raises ValueError for SO_LINGER with a time, with which close(2) would stop the loop:
`Timeouts.linger` is that time here.""",
        "timeouts": """\
How long this connection may take. Settable.""",
        "unread": """\
The bytes received and not delivered, as they came; they stay.""",
        "write": """\
`send` bytes as they are, whatever the framer.""",
        "write_eof": """\
Send a FIN once the outbox is empty; input goes on. Further messages are refused.""",
        "writelines": """\
`write` each; the last answer.""",
    },
    "Datagram": {
        "": """\
A datagram socket, UDP or Unix; made by `Mux.datagram`. Its methods never block and never call a callback.

Use it from the Mux's thread only.

address: where it receives, as `socket.getsockname` gives it. remote: what it is connected to, or None. limits: of
what is to be sent. mux: its Mux. closed: whether it is gone. data: yours.""",
        "close": """\
Send what the kernel takes at once, drop the rest, and close. No callback comes after it.""",
        "fileno": """\
The descriptor; -1 once closed.""",
        "getsockopt": """\
As `socket.getsockopt`.""",
        "send": """\
Queue a datagram; True while the queue is at or below `Limits.high`. It goes out at the end of the batch.

address: where to, with a numeric host; None, or the remote itself, on a socket with a remote.

`bytes` are kept by reference, any other buffer is copied before this returns. Never blocks, and never raises
because of the network: on a closed socket it counts a drop and returns False, and so it does for a sender that
cannot get a reply (port 0, or None for a Unix socket that is not bound). Beyond `max_outbox` `Limits.overflow`
decides. Raises TypeError or ValueError for a bad address, or data that no datagram can hold.""",
        "setsockopt": """\
As `socket.setsockopt`.""",
    },
    "Listener": {
        "": """\
A listening socket; made by `Mux.listen`.

address: where it listens, as `socket.getsockname` gives it. connections: how many of those it accepted are open.""",
        "close": """\
Stop listening. Connections that were accepted live on; those in the backlog are reset by the kernel.""",
        "closed": """\
Whether it listens no more.""",
        "dup": """\
A new `socket.socket` for the same listening socket: to pass to another process, say.

It is nonblocking, as both share one mode (`socket.dup` would make both blocking), and not inheritable (see
`pass_fds` of `subprocess.Popen`). It listens until you close it, also after `close` of this Listener; but that
removes the file of a path that `listen` was given, and no client finds the socket then.

Raises ConnectionClosed once closed, OSError without a descriptor left.""",
        "fileno": """\
The descriptor; -1 once closed.""",
        "mux": """\
The Mux that accepts for it.""",
    },
    "PythonCore": {
        "backend": """\
What it waits with: "epoll", "poll", "select" or "kqueue".""",
        "close": """\
Flush every connection once, without blocking, abort those with output left, and release everything.

Inside a callback it takes effect when that returns. In a forked child it only closes the descriptors. Once the
thread that the Mux was bound to has ended, any thread may call it, and `on_close` is called in that thread.""",
        "closed": """\
Whether `close` was called.""",
        "fileno": """\
The epoll descriptor: readable when `poll(0)` has something to do, so that another loop can drive this one.

From then on nothing is kept back for the next poll: `send` outside of callbacks sends at once.""",
        "poll": """\
Wait up to `timeout` seconds (None: for ever) for one batch of events and see to it.

Returns [(connection, flags), ...] for connections without a handler: OPENED, READABLE, DRAINED, EOF and
CLOSED, or'ed. The list is empty when the time was up, or when only callbacks ran.""",
        "stats": """\
The counters as they are now; from any thread.""",
        "stop": """\
Make `run` (this one, or else the next) return after the current batch; from any thread.""",
    },
}
