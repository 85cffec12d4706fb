"""What may live here: the docstrings of the compiled classes, written down for those of the fallback.

python tests/fallback_docs.py > src/muxcore/_fallback/docs.py
"""

from __future__ import annotations

import inspect
from typing import Any

import muxcore

HEAD = '''"""What may live here: what help() says of the fallback's classes.

tests/fallback_docs.py writes this file. The texts are those of the compiled classes, and a test compares the two.
"""

from __future__ import annotations

from types import MemberDescriptorType

from .._typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any, TypeVar

    T = TypeVar("T")


def documented(kind: type[T]) -> type[T]:
    """A decorator: the class with the texts of its members."""
    for name, text in TEXTS[kind.__name__].items():
        member: Any = getattr(kind, name) if name else kind
        if not isinstance(member, MemberDescriptorType):  # a slot has none: the text of its class does
            member.__doc__ = text
    return kind


'''

def texts() -> dict[str, dict[str, str]]:
    """By class and member; the class's own is that of ""."""
    from muxcore._epoll import CompiledCore

    found: dict[str, dict[str, str]] = {}
    names = ("Connection", "Datagram", "Listener", "NativeHandler")
    classes: dict[str, Any] = {name: getattr(muxcore, name) for name in names}
    for name, kind in {**classes, "PythonCore": CompiledCore}.items():
        own = {} if kind is CompiledCore else {"": inspect.cleandoc(kind.__doc__)}
        members = {member: value.__doc__ for member, value in sorted(vars(kind).items()) if not member.startswith("_")}
        found[name] = own | {member: inspect.cleandoc(text) for member, text in members.items() if text}
    return found


def main() -> None:
    lines = [HEAD + "TEXTS: dict[str, dict[str, str]] = {"]
    for name, members in texts().items():
        lines.append(f'    "{name}": {{')
        lines += [f'        "{member}": """\\\n{text}""",' for member, text in members.items()]
        lines.append("    },")
    print("\n".join([*lines, "}"]))


if __name__ == "__main__":
    main()
