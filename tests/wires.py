"""What may live here: how a test gives a connection a wire of its own."""

from __future__ import annotations

import sys
from typing import Any

import muxcore._fallback.wire
import muxcore._impl  # which imports the compiled core, if there is one


def begin(conn: Any, wire: Any) -> None:
    """As conn.start_tls, with that wire."""
    cores: list[Any] = [muxcore._fallback.wire]
    if "muxcore._epoll" in sys.modules:
        cores.append(sys.modules["muxcore._epoll"])
    makers = [core.tls_wire for core in cores]
    for core in cores:
        core.tls_wire = lambda *_: wire
    try:
        conn.start_tls(wire)
    finally:
        for core, maker in zip(cores, makers, strict=True):
            core.tls_wire = maker
