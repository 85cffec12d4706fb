"""What may live here: `python -m muxcore echo`, which is muxcore.serve and the two lines that it prints."""

from __future__ import annotations

import sys
import time

from .._config import Timeouts
from .._impl import Connection, Listener, Mux
from ..server import serve

LINGER = 1.0  # seconds: a user at a terminal waits no longer for a client that ignores the FIN


def run(host: str, port: int) -> int:
    """Echo on (host, port) until SIGINT or SIGTERM; returns the exit code."""
    muxes: list[Mux] = []

    def ready(mux: Mux, listener: Listener) -> None:
        muxes.append(mux)
        print(f"listening on {_shown(listener.address)}", flush=True)

    started = time.monotonic()
    try:
        serve(_echo, (host, port), ready=ready, timeouts=Timeouts(linger=LINGER))
    except (OSError, ValueError) as error:
        # The text that muxcore gave it names the address; the errno in front of it is noise.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        print(f"muxcore echo: {reason}", file=sys.stderr)
        return 1
    print(_summary(muxes[0], time.monotonic() - started), flush=True)
    return 0


def _echo(conn: Connection, message: bytes) -> None:
    conn.send(message)


def _shown(address: tuple[str, int]) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _summary(mux: Mux, seconds: float) -> str:
    stats = mux.stats()
    return (
        f"connections: {stats.accepts:,}, messages: {stats.messages_in:,}, bytes in: {stats.bytes_in:,}, "
        f"bytes out: {stats.bytes_out:,}, seconds: {seconds:.1f}"
    )
