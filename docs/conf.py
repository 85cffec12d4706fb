"""What may live here: how Sphinx builds these pages. `make docs`; the extension has to be built, its docstrings are
the API reference."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import muxcore
from muxcore import _epoll

project = "muxcore"
author = copyright = "The muxcore developers"
version = release = "0.1.0"
extensions = ["sphinx.ext.autodoc", "myst_parser"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "muxcore"
html_copy_source = False

myst_heading_anchors = 3  # the anchors that GitHub makes, too
default_role = "py:obj"  # docstrings put code between single backticks
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True
autodoc_docstring_signature = False
smartquotes = False  # "auto" is what one types

STUB = Path(_epoll.__file__).with_name("_epoll.pyi")
WORDS = {"_Buffer": "bytes | bytearray | memoryview", "_HasFileno": "HasFileno"}

# A Mux is its plain face (_mux.Mux) on a core; the reference shows it as one class.
public = (name for name in vars(_epoll.CompiledCore) if not name.startswith("_"))
MUX_OF_CORE = [name for name in public if not hasattr(muxcore.Mux, name)]
for name in MUX_OF_CORE:
    setattr(muxcore.Mux, name, getattr(_epoll.CompiledCore, name))


def signatures() -> dict[str, tuple[str, str]]:
    """The types of the extension's methods, which only its stub has: {"muxcore.Connection.send": (args, type)}."""
    mux = str(inspect.signature(muxcore.Mux.__init__, eval_str=True)).replace("(self, ", "(")
    found = {"muxcore.Mux": (mux.split(" -> ")[0], "")}
    for cls in ast.parse(STUB.read_text()).body:
        if isinstance(cls, ast.ClassDef):
            owner = "muxcore." + ("Mux" if cls.name == "CompiledCore" else cls.name)
            found.setdefault(owner, ("", ""))  # its class is not called by its name
            for method in cls.body:
                if isinstance(method, ast.FunctionDef):
                    args = "(" + re.sub(r"^self(, /)?(, )?", "", ast.unparse(method.args)) + ")"
                    for word, meaning in WORDS.items():
                        args = args.replace(word, meaning)
                    returns = ast.unparse(method.returns) if method.returns else ""
                    found[f"{owner}.{method.name}"] = (args, returns)
                    if method.name == "__init__":
                        found[owner] = (args, "")
    return found


SIGNATURES = signatures()


def signature(app: Any, what: str, name: str, *rest: Any) -> tuple[str, str] | None:
    return SIGNATURES.get(name) if what in ("method", "class") else None


def docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Blocks of `name: text` lines become lists; `*args` begins no emphasis; a named tuple's own words say nothing."""
    if lines[0].startswith("Alias for field number"):
        lines.clear()
        return
    blocks = re.split(r"\n{2,}", "\n".join(lines).strip().replace("*", "\\*"))
    for number, block in enumerate(blocks):
        items = re.split(r"\n(?=\S)", block)
        if all(re.match(r"\w+(, \w+)*: ", item) for item in items):
            blocks[number] = "\n".join(re.sub(r"^([\w, ]+): ", r"* **\1**: ", item) for item in items)
            blocks[number] = re.sub(r"\n +", "\n  ", blocks[number])
    lines[:] = "\n\n".join(blocks).splitlines() + [""]


def links(app: Any, page: str, source: list[str]) -> None:
    """Links to what is not among these pages work on GitHub; here a file becomes a download, a folder its name."""
    here = (Path(app.srcdir) / page).parent

    def link(match: re.Match[str]) -> str:
        text, target = match.groups()
        path = (here / target).resolve()
        if not path.exists():
            raise FileNotFoundError(f"{page}: {target}")
        if path.is_relative_to(app.srcdir):
            return match[0]
        return f"`{target.lstrip('./')}`" if path.is_dir() else f"{{download}}`{text} <{target}>`"

    source[0] = re.sub(r"(?<!!)\[([^\]]+)\]\((\.\./[^)#]+)\)", link, source[0])


def setup(app: Any) -> None:
    app.connect("source-read", links)
    app.connect("autodoc-process-signature", signature)
    app.connect("autodoc-process-docstring", docstring)
