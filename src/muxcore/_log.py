"""What may live here: the logger. logging takes as long to import as muxcore does: it waits for a first Mux."""

from __future__ import annotations

from ._typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any


class Log:
    """logging.getLogger("muxcore"), whose handlers are the user's code: they may do what a callback may do, and one
    that raises changes nothing for the loop or the other connections. Its error is printed as logging prints its own.
    """

    __slots__ = ()

    def error(self, text: str, /, *args: object, exc_info: BaseException | None = None) -> None:
        self._write("error", text, args, exc_info)

    def warning(self, text: str, /, *args: object) -> None:
        self._write("warning", text, args, None)

    def _write(self, level: str, text: str, args: tuple[object, ...], exc_info: BaseException | None) -> None:
        import logging

        try:
            write: Any = getattr(logging.getLogger("muxcore"), level)
            write(text, *args, exc_info=exc_info)
        except Exception:
            try:
                logging.NullHandler().handleError(logging.makeLogRecord({"msg": text, "args": args}))
            except Exception:
                pass  # a daemon has closed stderr: there is no place left to say it


log = Log()
