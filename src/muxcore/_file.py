"""What may live here: what sendfile asks of a file, for both cores."""

from __future__ import annotations

import io
import os
import stat

from ._config import check_int
from ._typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any


def check_file(file: Any, offset: int, count: int | None) -> tuple[int, int]:
    """The descriptor of a regular file, and how many bytes are meant; None is up to the end.

    Raises TypeError or ValueError, naming the argument, for anything else, and for what is beyond the end.
    """
    check_int("offset", offset, 0)
    if count is not None:
        check_int("count", count, 0)
    try:
        fd = file if type(file) is int else file.fileno()
    except (AttributeError, io.UnsupportedOperation):
        raise TypeError(f"file must be an open file or its descriptor, not {type(file).__name__}") from None
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"file must be a regular file, not {file!r}")
    left = status.st_size - offset
    if left < 0:
        raise ValueError(f"offset must be <= {status.st_size}, the size of the file, not {offset}")
    if count is not None and count > left:
        raise ValueError(f"count must be <= {left}, what the file has behind offset, not {count}")
    return fd, left if count is None else count
