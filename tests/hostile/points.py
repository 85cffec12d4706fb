"""What may live here: the points: the calls of a core that may run user code (Promise any-user-code), and what reaches
each.

A point is hit by world.hit(name, link) in workload.py or world.py. `steps` are what a connection does for each of its
messages so that its point is reached; they are functions of workload.py.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

HANDLERS = ("message", "messages")
STYLES = (*HANDLERS, "pull")
BUILTIN = ("none", "lines", "delimiter", "fixed", "prefix", "resp", "inline")
FRAMINGS = (*BUILTIN, "custom")


class Point(NamedTuple):
    styles: tuple[str, ...] = STYLES
    framings: tuple[str, ...] = FRAMINGS
    steps: tuple[str, ...] = ()
    asynchronous: bool = False  # it may come in the middle of anything, not only where a callback is promised
    calls: int = 3  # in a scenario, at least: the injection is at one of them
    never: bool = False  # no core may call it any more: that it is reached is a finding


CUSTOM = ("custom",)
RESP = ("resp", "inline")

POINTS = {
    # callbacks of a handler
    "on_open": Point(HANDLERS, calls=1),
    "on_message": Point(("message",)),
    "on_messages": Point(("messages",)),
    "on_drain": Point(HANDLERS, steps=("burst",), calls=1),
    "on_eof": Point(HANDLERS, steps=("half_close",), calls=1),
    "on_error": Point(HANDLERS, steps=("malformed",), calls=1),
    "on_close": Point(HANDLERS, calls=1),
    # pull style
    "pull_between": Point(("pull",)),
    "pull_iterating": Point(("pull",)),
    # a framer of the user's
    "factory": Point(framings=CUSTOM, steps=("reframe",)),
    "feed_before": Point(framings=CUSTOM),
    "feed_between": Point(framings=CUSTOM),
    "feed_after": Point(framings=CUSTOM),
    "encode": Point(framings=CUSTOM),
    "rest": Point(framings=CUSTOM, steps=("rest",)),
    # a wire
    "wire_advance": Point(),
    "wire_encrypt": Point(),
    "wire_finish": Point(steps=("half_close",), calls=1),
    "wire_eof": Point(steps=("half_close",), calls=1),
    # what is sent
    "iterable_send_many": Point(steps=("send_many",)),
    "iterable_writelines": Point(steps=("writelines",)),
    "iterable_broadcast": Point(steps=("broadcast",)),
    "reply_str": Point(framings=RESP, steps=("evil_reply",)),
    "reply_iter": Point(framings=RESP, steps=("evil_reply",)),
    "reply_len": Point(framings=RESP, steps=("evil_reply",)),
    "sendfile_fileno": Point(steps=("sendfile",)),
    "address_hash": Point(steps=("datagram",), never=True),
    "address_eq": Point(steps=("datagram",), never=True),
    # what is called when an object goes
    "del_message": Point(framings=CUSTOM, asynchronous=True),
    "del_data": Point(steps=("data",), asynchronous=True),
    "del_framer": Point(framings=CUSTOM, steps=("reframe",), asynchronous=True),
    "weakref": Point(steps=("weakref",), asynchronous=True),
    "cycle": Point(steps=("cycle",), asynchronous=True),
    "unraisable": Point(steps=("unraisable",), asynchronous=True),
    # calls from the loop
    "timer": Point(steps=("timers",)),
    "call_soon": Point(steps=("timers",)),
    "reader": Point(steps=("reader",)),
    "on_done": Point(steps=("executor",)),
    "on_datagrams": Point(steps=("datagram",)),
    "signal_handler": Point(steps=("mux_signal",)),
    # from anywhere
    "log": Point(steps=("log",), asynchronous=True),
    "signal": Point(steps=("signal",), asynchronous=True),  # with --signals also by a timer of the system
    # between two instructions of muxcore's own Python, where a signal may arrive as well
    "instruction": Point(steps=("many_timers", "reader", "reframe"), asynchronous=True, calls=4000),
    "instruction_timers": Point(steps=("many_timers",), asynchronous=True, calls=1800),  # of _timers.py alone
    # where the collector starts in the core itself; there it is always awake
    "collection": Point(steps=("datagram",), asynchronous=True, calls=20),
    # a framer of the user's, when a message is in no buffer
    "feed_found": Point(framings=CUSTOM),
}


def point_of(point: str) -> Point:
    """`instruction:NAME` counts the instructions of the function of that qualified name alone."""
    return POINTS[point.partition(":")[0]]


if sys.version_info >= (3, 12):  # where an object's __buffer__ may be Python's
    POINTS["buffer"] = Point(steps=("buffer",))
