"""What may live here: whether the thread that a Mux belongs to still lives."""

from __future__ import annotations

from _thread import _local
from _weakref import ref

from ._typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class _Thread:
    __slots__ = ("__weakref__",)


_here = _local()


def what_lives_as_long_as_this_thread() -> Callable[[], object]:
    """A weak reference to an object that goes when the calling thread ends. (Numbers of threads are soon reused.)"""
    try:
        thread = _here.thread
    except AttributeError:
        thread = _here.thread = _Thread()
    return ref(thread)
