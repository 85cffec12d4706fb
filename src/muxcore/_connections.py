"""What may live here: the view of the open connections of a Mux."""

from __future__ import annotations

from collections.abc import Collection

from ._typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ._epoll import Connection
    from ._mux import Mux


class Connections(Collection["Connection"]):
    """A live view of a Mux's connections, those in a handshake included, for iteration, `len()` and `in`."""

    __slots__ = ("_mux",)

    def __init__(self, mux: Mux) -> None:
        self._mux = mux

    def __iter__(self) -> Iterator[Connection]:
        return iter(self._mux._connections())

    def __len__(self) -> int:
        return self._mux.stats().connections

    def __contains__(self, conn: object) -> bool:
        return getattr(conn, "mux", None) is self._mux and not conn.closed  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return f"<muxcore connections: {len(self)}>"
