"""What may live here: the checks of a file for sendfile, for both cores."""

from __future__ import annotations

import errno
import io
import os
import stat

from ._config import check_int
from ._typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

WHOLE = 65536  # bytes of a part that is read at once: above, it has a descriptor until its turn comes
UNSIZED = 1 << 20  # bytes of a file that does not say how many it has
FILES_KEPT = 32  # parts that have a descriptor, of one connection


def file_part(file: Any, offset: int, count: int | None) -> tuple[int, int, bytes | None]:
    """A part of a regular file: descriptor, bytes from offset on, and these bytes unless they are too many.

    Runs code of the user's: the file's `fileno()`. Raises TypeError or ValueError, naming the argument, for what is no
    such part.
    """
    offset = check_int("offset", offset, 0)
    if count is not None:
        count = check_int("count", count, 0)
    fd = _descriptor(file)
    if fd >> 31:
        raise ValueError(f"file must be an open file or its descriptor, not {file!r}")
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"file must be a regular file, not {file!r}")
    try:
        return _part(fd, status.st_size, offset, count)
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
        raise ValueError(f"file must be open for reading, and {file!r} is not") from None


def _descriptor(file: Any) -> int:
    try:
        fd = file if type(file) is int else file.fileno()
    except (AttributeError, io.UnsupportedOperation):
        raise TypeError(f"file must be an open file or its descriptor, not {type(file).__name__}") from None
    if not isinstance(fd, int):
        raise TypeError(f"file must have a fileno() that returns an int, not {type(fd).__name__}")
    return int(fd)


def _part(fd: int, size: int, offset: int, count: int | None) -> tuple[int, int, bytes | None]:
    content = None
    if size == 0:  # as the files of /proc say, whatever they have
        content = _read(fd, 0, UNSIZED + 1)
        size = len(content)
        if size > UNSIZED:
            raise ValueError(f"file must report its size, or have at most {UNSIZED} bytes")
    left = size - offset
    if left < 0:
        raise ValueError(f"offset must be <= {size}, the size of the file, not {offset}")
    if count is not None and count > left:
        raise ValueError(f"count must be <= {left}, the bytes after offset, not {count}")
    wanted = left if count is None else count
    if content is not None:
        return fd, wanted, content[offset : offset + wanted]
    if wanted > WHOLE:
        read_at(fd, offset, 1)  # raises if it cannot be read
        return fd, wanted, None
    data = _read(fd, offset, wanted)
    if count is not None and len(data) < count:  # the files of /sys have less than they say
        raise ValueError(f"count must be <= {len(data)}, the bytes after offset, not {count}")
    return fd, len(data), data


def _read(fd: int, offset: int, size: int) -> bytes:
    """So many bytes, or those up to the end. The files of /proc give a few at a time."""
    pieces = []
    while size and (piece := read_at(fd, offset, size)):
        pieces.append(piece)
        offset += len(piece)
        size -= len(piece)
    return b"".join(pieces)


def read_at(fd: int, offset: int, size: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(fd, size, offset)
    os.lseek(fd, offset, os.SEEK_SET)  # Windows: the caller's descriptor is moved, too
    return os.read(fd, size)
