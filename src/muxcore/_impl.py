"""What may live here: the choice of the core, made once. So far there is one."""

from __future__ import annotations

from ._epoll import CLOSED, DRAINED, EOF, OPENED, READABLE, Connection, Listener, Mux, TimerHandle

__all__ = ["CLOSED", "DRAINED", "EOF", "OPENED", "READABLE", "Connection", "Listener", "Mux", "TimerHandle"]
