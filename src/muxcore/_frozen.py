"""What may live here: Frozen, the base of settings and framers: values that do not change.

They would be dataclasses, if importing those did not take longer than importing all of muxcore.
"""

from __future__ import annotations

from ._typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any, Self


class Frozen:
    """A value of the fields in __slots__, which are also the keyword arguments of __init__."""

    __slots__ = ()

    def _set(self, **fields: object) -> None:
        for name in fields:
            if hasattr(self, name):  # __init__ is called again
                raise AttributeError(f"cannot set {name!r}: {type(self).__name__} is immutable")
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def _fields(self) -> dict[str, Any]:
        names: tuple[str, ...] = self.__slots__
        return {name: getattr(self, name) for name in names}

    def __replace__(self, /, **changes: Any) -> Self:
        """A copy with some fields changed, checked like a new one; copy.replace (Python 3.13) calls this."""
        return type(self)(**self._fields() | changes)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"cannot set {name!r}: {type(self).__name__} is immutable")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"cannot delete {name!r}: {type(self).__name__} is immutable")

    def __eq__(self, other: object) -> bool:
        return self._fields() == other._fields() if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash((type(self), *self._fields().values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._fields().items())})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _make, (type(self), self._fields())


def _make(cls: type[Frozen], fields: dict[str, Any]) -> Frozen:
    return cls(**fields)
