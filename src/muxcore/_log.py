"""What may live here: the logger. logging takes as long to import as muxcore does: it waits for a first Mux."""

from __future__ import annotations

from ._typing import TYPE_CHECKING

if TYPE_CHECKING:
    from logging import Logger
    from typing import Any


class _Log:
    """The methods of logging.getLogger("muxcore")."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        import logging

        return getattr(logging.getLogger("muxcore"), name)


log: Logger = _Log()  # type: ignore[assignment]
