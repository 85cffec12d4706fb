"""What may live here: a lock that an interrupt cannot leave locked."""

from __future__ import annotations

import sys
from _thread import RLock

__all__ = ["Lock"]


class Lock(RLock):  # type: ignore[misc]  # CPython's may be a base
    """CPython 3.14, and no other, looks for signals between the acquire of `with lock:` and its block: what a handler
    raises there would leave the lock locked for ever."""

    if sys.version_info[:2] == (3, 14):

        def __enter__(self) -> bool:
            count = self._recursion_count()
            try:
                return self.acquire()
            except BaseException:
                if self._recursion_count() > count:
                    self.release()
                raise
