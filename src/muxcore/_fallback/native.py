"""What may live here: the place of NativeHandler, which only the compiled core has."""

from __future__ import annotations

from .._typing import TYPE_CHECKING
from .docs import documented

if TYPE_CHECKING:
    from typing import Any, Self


@documented
class NativeHandler:

    __slots__ = ()

    def __new__(cls, *args: Any, **options: Any) -> Self:
        raise TypeError("a NativeHandler needs the compiled core")
