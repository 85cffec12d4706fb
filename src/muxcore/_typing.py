"""What may live here: what a running program needs of typing, which takes half as long to import as all of muxcore.

So nothing in the package imports typing when it runs: annotations are strings, and their names are imported for type
checkers only, for which TYPE_CHECKING is true wherever it comes from.
"""

from __future__ import annotations

from collections import namedtuple

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any
    from typing import Generic as Generic
    from typing import NamedTuple as NamedTuple
    from typing import Protocol as Protocol
    from typing import final as final

    from typing_extensions import TypeVar

    T = TypeVar("T", default=Any)
else:
    Protocol = object
    T = "T"
    Generic = {T: object}  # Generic[T], where it is a base class

    def final(cls):
        return cls

    class _MakesNamedTuples(type):
        def __new__(cls, name, bases, body):
            if not bases:
                return super().__new__(cls, name, bases, body)
            fields = body["__annotations__"]
            defaults = [body[field] for field in fields if field in body]
            made = namedtuple(name, fields, defaults=defaults, module=body["__module__"])
            made.__doc__ = body.get("__doc__")
            return made

    class NamedTuple(metaclass=_MakesNamedTuples):
        pass


def explain(fields: type, texts: dict[str, str]) -> None:
    """Texts for help() of a NamedTuple's fields, which says "Alias for field number 0" of its own."""
    for name, text in texts.items():
        vars(fields)[name].__doc__ = text
