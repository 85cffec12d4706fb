"""The rules of the house that a program can check."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import muxcore
import muxcore._impl
import muxcore.aio

HERE = Path(__file__).parent
SOURCE = HERE.parent / "src" / "muxcore"
COMPILED = [*SOURCE.rglob("*.pyx"), *SOURCE.rglob("*.pxi"), *SOURCE.rglob("*.pxd")]
PYTHON = [*SOURCE.rglob("*.py")]
SCREEN = 60  # lines

# From the lowest up: each imports only from those before it. Chapters (.pxi) belong to _epoll.pyx.
LEAVES = ("syscalls", "frame", "buffer", "packets", "openssl")
FALLBACK = (
    "docs", "syscalls", "pollers", "policy", "state", "outbox", "inbox", "wire", "connection", "listener", "datagram",
    "slots",
    "threads", "loop", "end", "mux", "native",
)
ROOMS = (
    "_typing", "_log", "_frozen", "errors", "_config", "handler", "_protocols", "_report", "_stats", "_connections",
    "_timers", "_watch", "_own", "_owner", "_signals", "framing", "_frame", "_custom", "_file", "_unix", "_address",
    "_lock", "_pool", "_connect", "_wire", "proxy_protocol", "tls", "_wiring", "_mux", "_epoll", "_fallback", "_impl",
    "_coroutines", "aio", "selectors", "threads", "server", "_cli", "__init__", "__main__",
)

# Which tests look into a room first. test_cores and test_model compare whole cores, test_peers has foreign clients.
TESTS = {
    "__init__": "house", "__main__": "cli", "_address": "address listener", "_cli": "cli demo bench",
    "_config": "config", "_connect": "connect", "_connections": "mux", "_coroutines": "coroutines", "_core": "house",
    "_custom": "messages soundness", "_fallback": "fallback", "_file": "sendfile messages",
    "_frame": "framing fuzz", "_frozen": "config", "_impl": "impl", "_log": "package", "_mux": "mux", "_own": "mux",
    "_lock": "pool", "_owner": "mux", "_pool": "pool", "_protocols": "package", "_report": "mux",
    "_signals": "signals watch", "_stats": "mux", "_timers": "mux", "_typing": "package",
    "_unix": "unix", "_watch": "watch", "_wire": "wire", "_wiring": "wire", "aio": "aio", "errors": "config",
    "framing": "framing", "handler": "handler", "proxy_protocol": "proxy_protocol", "selectors": "selectors stdlib",
    "server": "server", "threads": "threads", "tls": "tls tls_peers tls_defaults",
    "_epoll": "epoll impl",
    # Chapters, of both cores.
    "*/buffer": "messages", "*/check": "check", "*/connection": "connection timeouts", "*/datagram": "datagram",
    "*/docs": "twins",
    "*/end": "mux", "*/frame": "framing fuzz", "*/inbox": "messages cores", "*/listener": "listener",
    "*/loop": "mux timeouts", "*/mux": "mux", "*/native": "native", "*/outbox": "messages model",
    "*/packets": "datagram",
    "*/policy": "config", "*/pollers": "fallback kqueue", "*/slots": "watch", "*/state": "connection mux",
    "*/openssl": "tls", "*/tls": "tls tls_through_ssl",
    "*/syscalls": "kernel faults", "*/threads": "freethreading mux", "*/wire": "wire tls",
}
# Of everything at once.
WHOLE = {
    "docs", "guides", "hostile", "hostile_code", "house", "mutants", "peers", "promises", "readme", "soak",
    "soundness", "stubborn", "tutorial", "twins",
}
PROGRAMS = {  # examples
    "kvstore", "proxy", "resp_store", "httpd", "rpc", "chat", "pubsub", "websocket_echo", "statsd_server", "asyncore",
}


def name_of(path: Path) -> str:
    """The room that a file is; a chapter has one name in both cores."""
    if path.parent.name in ("_core", "_fallback"):
        return path.parent.name if path.stem == "__init__" else f"*/{path.stem}"
    return "_cli" if path.parent.name == "_cli" else path.stem


# --- which module imports which --------------------------------------------------------------------


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """What a module imports at run time: how many dots, and the room or chapter."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("muxcore")):
            module = (node.module or "").removeprefix("muxcore").strip(".")
            names = [module.split(".")[0]] if module else [alias.name for alias in node.names]
            yield from ((node.level, name) for name in names)
        yield from imported(node)


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    room = name_of(path)
    for dots, other in imported(ast.parse(path.read_text())):
        if room.startswith("*/") and dots == 1:
            assert FALLBACK.index(other) < FALLBACK.index(path.stem), f"{path.stem} must not import {other}"
        else:
            home = "_fallback" if room.startswith("*/") else room
            below = ROOMS.index(other) < ROOMS.index(home) if home != "_cli" or other in ROOMS else True
            assert below, f"{room} must not import {other}"


@pytest.mark.parametrize("path", COMPILED, ids=lambda path: path.name)
def test_compiled_imports_point_down(path: Path) -> None:
    text = path.read_text()
    for other in re.findall(r"^from \.(?:_core\.)?(\w+) cimport", text, re.MULTILINE):
        assert path.stem not in LEAVES or LEAVES.index(other) < LEAVES.index(path.stem)
    for line in re.findall(r"^from \.(\w*) import (.*)", text, re.MULTILINE):
        for other in [line[0]] if line[0] else line[1].split(", "):
            assert ROOMS.index(other) < ROOMS.index("_epoll")


# Which chapter of the compiled core calls which. The circles that remain are those of a connection's life. A read may
# end it: inbox -> connection. Its end reports unread messages: connection -> inbox. A send may fail: outbox ->
# connection. Each leaves work for the turn (-> loop), which calls all of them.
CALLS: dict[str, set[str]] = {
    "check": {"connection", "datagram"},
    "connection": {"inbox", "listener", "loop", "outbox", "policy", "slots", "threads", "wire"},
    "datagram": {"connection", "loop", "slots", "threads"},
    "end": {"connection", "datagram", "inbox", "listener", "loop", "outbox", "threads", "wire"},
    "inbox": {"connection", "loop", "outbox", "policy", "threads", "wire"},
    "listener": {"connection", "inbox", "loop", "slots", "threads", "wire"},
    "loop": {
        "check", "connection", "datagram", "end", "inbox", "listener", "outbox", "slots", "threads", "wire",
    },
    "mux": {"connection", "datagram", "end", "listener", "loop", "outbox", "slots", "threads", "wire"},
    "native": {"connection"},
    "outbox": {"connection", "loop", "threads", "wire"},
    "policy": set(),
    "slots": {"connection", "datagram", "loop"},
    "threads": {"connection", "loop", "outbox"},
    "tls": {"connection", "inbox", "outbox", "threads", "wire"},
    "wire": {"connection", "inbox", "loop", "outbox", "threads", "tls"},
}


def chapter_calls() -> dict[str, set[str]]:
    chapters = [path for path in COMPILED if path.suffix == ".pxi"]
    code = {path.stem: re.sub(r'#.*|"""(?:.|\n)*?"""', "", path.read_text()) for path in chapters}
    home = {
        name: chapter
        for chapter, text in code.items()
        for name in re.findall(r"^(?:cdef|def) (?:[^\n(]*\W)?(\w+)\(", text, re.MULTILINE)
    }
    return {
        chapter: {home[name] for name in re.findall(r"(?<![.\w])(\w+)\(", text) if name in home} - {chapter}
        for chapter, text in code.items()
    }


def test_chapters_call_only_those_that_they_may() -> None:
    assert chapter_calls() == CALLS


@pytest.mark.parametrize("path", [path for path in COMPILED if path.name != "syscalls.pxd"], ids=lambda path: path.name)
def test_errno_is_used_in_syscalls_alone(path: Path) -> None:
    assert not re.search(r"\berrno\b(?!s)", re.sub(r'#.*|""".*?"""', "", path.read_text(), flags=re.DOTALL))


@pytest.mark.parametrize("name", LEAVES)
def test_leaves_use_no_python_object(name: str) -> None:
    code = re.sub(r'#.*|"""(?:.|\n)*?"""', "", (SOURCE / "_core" / f"{name}.pxd").read_text())
    assert not re.search(r"\b(object|PyObject|bytes|list|dict|tuple|str|raise|except)\b", code)
    bodies = re.findall(r"^cdef inline .*?:$", code, re.MULTILINE | re.DOTALL)
    assert bodies
    assert all("noexcept nogil" in head for head in bodies)


def test_the_collector_makes_nothing_none_that_is_read_without_a_look() -> None:
    """What it clears is None, and objects that go with it may still be used: of a class whose attributes are structs or
    containers for the compiled code, it clears nothing. (A Policy without a listener is an ordinary one.)"""
    layout = re.sub(r"#.*", "", (SOURCE / "_epoll.pxd").read_text())
    code = "".join(path.read_text() for path in COMPILED)
    classes = re.findall(r"^cdef class (\w+):\n((?:    .*\n|\n)+)", layout, re.MULTILINE)
    typed = "|".join(["dict", "list", "set", "tuple", *(name for name, _ in classes)])
    for name, attributes in classes:
        if re.search(rf"^    cdef (?:public |readonly )?(?:{typed}) \w", attributes, re.MULTILINE) and name != "Policy":
            assert re.search(rf"^@cython.no_gc_clear\b.*\ncdef class {name}:", code, re.MULTILINE), name
    assert len(classes) == 8


def unguarded_loops(tree: ast.AST) -> Iterator[int]:
    """Lines of loops in a `try` that has to see an interrupt, or in a `with`."""
    for node in ast.walk(tree):
        guards = isinstance(node, ast.With) or (
            isinstance(node, ast.Try)
            and (node.finalbody or any(ast.unparse(one.type or node) == "BaseException" for one in node.handlers))
        )
        if guards:
            inner = [each for statement in node.body for each in ast.walk(statement)]  # type: ignore[attr-defined]
            yield from (each.lineno for each in inner if isinstance(each, ast.For | ast.While))


@pytest.mark.parametrize("path", [path for path in PYTHON if name_of(path) != "_cli"], ids=lambda path: path.name)
def test_no_loop_is_between_an_interrupt_and_its_handler(path: Path) -> None:
    """CPython looks for signals where a loop jumps back, and 3.13's exception tables leave that instruction out: what a
    signal handler raises there passes `finally`, `except BaseException` and the end of a `with`. So the loop is a
    function of its own, whose call the table covers."""
    assert list(unguarded_loops(ast.parse(path.read_text()))) == []


# --- sizes -----------------------------------------------------------------------------------------


class Function(NamedTuple):
    name: str
    lines: int


def python_functions(text: str) -> Iterator[Function]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield Function(node.name, node.end_lineno - node.lineno + 1)


def cython_functions(text: str) -> Iterator[Function]:
    """By indentation: a head that opens at `def` or at a `cdef` with parentheses, and what is further to the right."""
    lines = text.splitlines()
    for i, line in enumerate(lines):
        head = re.match(r"( *)(?:c?def|cpdef) (?:.*\W)?(\w+)\(", line)
        if head is None:
            continue
        end = i + 1
        while end < len(lines) and (not lines[end].strip() or re.match(rf"{head[1]}[ )]", lines[end])):
            end += 1
        yield Function(head[2], len("\n".join(lines[i:end]).rstrip().splitlines()))


@pytest.mark.parametrize("path", [*PYTHON, *COMPILED], ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_function_fits_on_a_screen(path: Path) -> None:
    find = python_functions if path.suffix == ".py" else cython_functions
    for function in find(path.read_text()):
        assert function.lines <= SCREEN, f"{function.name} has {function.lines} lines"


def test_cython_functions_are_seen() -> None:
    """The test above would be content with none."""
    found = {function.name: function.lines for path in COMPILED for function in cython_functions(path.read_text())}
    assert {"sys_recv", "chunk_parts", "frame_scan", "flush", "run_pending", "dispatch_group", "poll"} <= found.keys()
    assert found["dispatch_group"] > 20


@pytest.mark.skipif("epoll" not in muxcore._impl.BACKENDS, reason="the sizes are those of the compiled classes")
@pytest.mark.parametrize(("name", "most"), [("Connection", 192), ("Listener", 96), ("TimerHandle", 64)])
def test_objects_do_not_grow_unnoticed(name: str, most: int) -> None:
    """Bytes without the collector's header. Tens of thousands of each may exist: more needs a reason. (Without a GIL
    every object of Python's is larger.)"""
    assert getattr(muxcore, name).__basicsize__ - object.__basicsize__ <= most - 16


# --- tests and words -------------------------------------------------------------------------------


def test_every_room_has_its_tests() -> None:
    rooms = {name_of(path) for path in [*PYTHON, *COMPILED]}
    assert rooms == TESTS.keys()


def test_every_test_belongs_to_a_room() -> None:
    files = {path.stem.removeprefix("test_") for path in HERE.glob("test_*.py")}
    assert files == WHOLE | PROGRAMS | {name for names in TESTS.values() for name in names.split()}


PUBLIC = {name: getattr(muxcore, name) for name in muxcore.__all__ if callable(getattr(muxcore, name))}
PUBLIC |= {"aio.attach": muxcore.aio.attach, "aio.Attachment": muxcore.aio.Attachment}


def members() -> Iterator[tuple[str, Any, type]]:
    """What the public classes have that is not Python's: (name, member, class)."""
    for value in PUBLIC.values():
        for base in getattr(value, "__mro__", ()):
            for name, member in vars(base).items():
                if base.__module__.startswith("muxcore") and not name.startswith("_"):
                    yield name, member, base


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name: str) -> None:
    assert PUBLIC[name].__doc__


@pytest.mark.skipif("epoll" not in muxcore._impl.BACKENDS, reason="docstrings are in the compiled classes")
def test_public_members_are_documented() -> None:
    """By a docstring of their own; data by a word in that of their class, callbacks of a handler by that of Handler."""
    silent = []
    for name, member, owner in members():
        by_class = not callable(member) and re.search(rf"\b{name}\b", owner.__doc__ or "")
        if not (member.__doc__ or by_class or hasattr(muxcore.Handler, name) or name in ("on_message", "on_messages")):
            silent.append(f"{owner.__name__}.{name}")
    assert silent == []


@pytest.mark.parametrize("fields", [muxcore.Stats, muxcore.PeerCredentials])
def test_each_field_of_a_tuple_is_explained(fields: Any) -> None:
    """In help(), where a NamedTuple has a text of its own for each."""
    assert [name for name in fields._fields if "Alias for field" in getattr(fields, name).__doc__] == []


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_file_of_python_is_not_too_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 700


# --- the table of questions in ARCHITECTURE ---------------------------------------------------------


def test_functions_that_architecture_names_are_in_their_files() -> None:
    page = HERE.parent / "docs" / "ARCHITECTURE.md"
    if not page.exists():
        pytest.skip("the pages are not beside the tests")
    [table] = re.findall(r"^## Where to look\n(.*?)^## ", page.read_text(), re.DOTALL | re.MULTILINE)
    places = re.findall(r"`(\w+\.px[di])`: ((?:`\w+`(?:, )?)+)", table)
    assert len(places) > 10
    for file, names in places:
        text = (SOURCE / "_core" / file).read_text()
        for name in re.findall(r"\w+", names):
            assert re.search(rf"^(?:cdef|def) .*\b{name}\(", text, re.MULTILINE), f"{file} has no {name}"
