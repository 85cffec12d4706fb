"""What may live here: the two cores beside each other: what must not drift apart."""

from __future__ import annotations

import ast
import inspect
import re
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fallback_docs
import pytest
from support import LOCALHOST

import muxcore
from muxcore._fallback import connection, datagram, docs, listener, mux
from muxcore._impl import BACKENDS

SOURCE = Path(__file__).parents[1] / "src" / "muxcore"
CORE, FALLBACK = SOURCE / "_core", SOURCE / "_fallback"
CHAPTERS = sorted(path for path in CORE.glob("*.pxi") if path.stem != "check")
PYTHON = sorted(path for path in FALLBACK.glob("*.py") if path.stem not in ("docs", "pollers"))

pytestmark = pytest.mark.skipif(not CORE.exists(), reason="the sources of the compiled core are not beside the tests")
both = pytest.mark.skipif("epoll" not in BACKENDS, reason="the compiled core is missing")


def code_of(path: Path) -> str:
    """A chapter of the compiled core without docstrings and comments."""
    return re.sub(r"#.*", "", re.sub(r'"""(?:.|\n)*?"""', "", path.read_text()))


# --- functions -------------------------------------------------------------------------------------

# By lines of two names: of the compiled core, and of the fallback.
TWINS = [line.split() for line in (Path(__file__).parent / "twins.txt").read_text().splitlines() if line[:1] not in "#"]


def compiled_functions() -> set[str]:
    head = r"^ *(?:cdef|def|cpdef) (?:[^\n(=]*\W)?(\w+)\("
    names = {name for path in CHAPTERS for name in re.findall(head, code_of(path), re.MULTILINE)}
    return {name.lstrip("_") for name in names if not name.endswith("__")}


def fallback_functions() -> set[str]:
    nodes = [node for path in PYTHON for node in ast.walk(ast.parse(path.read_text()))]
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    return {name.lstrip("_") for name in names if not name.endswith("__")}


def test_each_function_has_its_twin_or_stands_in_the_list() -> None:
    compiled, ours = compiled_functions(), fallback_functions()
    assert compiled - ours == {left for left, _ in TWINS} - {"-"} - ours
    named = {right for left, right in TWINS if left != "-"}
    assert ours - compiled - named == {right for left, right in TWINS if left == "-"}


def test_the_list_of_twins_names_what_there_is() -> None:
    assert {left for left, _ in TWINS} - {"-"} <= compiled_functions()
    assert {right for _, right in TWINS} - {"-"} <= fallback_functions()


# --- constants and texts ---------------------------------------------------------------------------


def compiled_constants() -> dict[str, int]:
    texts = [code_of(path) for path in [*CHAPTERS, *CORE.glob("*.pxd")]]
    constant = r"^ *(?:cdef \w+ )?([A-Z][A-Z_0-9]+) = (\d[\d_]*(?: << \d+)?)\s*$"
    found = re.findall(constant, "\n".join(texts), re.MULTILINE)
    return {name: eval(value) for name, value in found}


def test_constants_are_the_same() -> None:
    ours: dict[str, Any] = {}
    for path in FALLBACK.glob("[a-z]*.py"):
        ours |= vars(__import__(f"muxcore._fallback.{path.stem}", fromlist=["*"]))
    both = {name: value for name, value in compiled_constants().items() if isinstance(ours.get(name), int)}
    del both["TOO_LARGE"]  # a state of a framer there, an errno of Windows' here
    assert len(both) >= 15
    assert {name: ours[name] for name in both} == both


# Messages that only one of the cores needs.
TEXTS_OF_COMPILED = {
    " in a reply",  # Py_EnterRecursiveCall's; Python's own recursion says where it was
    "inet_ntop does not know address family {}",
    "framer was changed: {}",  # by object.__setattr__: memory depends on it there
    "conn must be a Connection, not None",  # of a user's module in C
    "OpenSSL failed",  # when the compiled core has called it
    "{} cannot continue to read",
    "handler of {} raised",  # the fallback has one text for handlers and framers, the next but one
}
TEXTS_OF_FALLBACK = {
    "Connection is not subclassed: put your state on .data",  # Cython says it of final classes
    "Datagram is not subclassed: put your state on .data",
    "{} of {} raised",
    "a Connection can be neither copied nor pickled",  # Cython says that there is no pickle
    "a Datagram can be neither copied nor pickled",
    "a Mux can be neither copied nor pickled",
    "a NativeHandler needs the compiled core",
    "fileno: the {} backend has no descriptor for another loop to watch",
    "handler: a NativeHandler needs the epoll backend, whose core is compiled",
}


def shape(text: str) -> str:
    return re.sub(r"%[rsd]|\{[^{}]*\}", "{}", text)


def compiled_texts() -> set[str]:
    strings = re.findall(r'(?:f?"(?:[^"\\\n]|\\.)*"\s*)+', "\n".join(code_of(path) for path in CHAPTERS))
    texts = ["".join(re.findall(r'f?"((?:[^"\\\n]|\\.)*)"', string)) for string in strings]
    return {shape(text) for text in texts if " " in text.strip()}


def fallback_texts() -> Iterator[str]:
    for path in PYTHON:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        inside = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
        inside |= {id(node.value) for node in nodes if isinstance(node, ast.Expr)}  # docstrings
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
                yield shape(node.value)


def test_errors_and_logs_say_the_same() -> None:
    ours = {shape(text) for text in fallback_texts() if " " in text.strip()}
    assert compiled_texts() - ours == TEXTS_OF_COMPILED
    assert ours - compiled_texts() == TEXTS_OF_FALLBACK


# --- faces -----------------------------------------------------------------------------------------

FACES = {
    "Connection": connection.Connection,
    "Datagram": datagram.Datagram,
    "Listener": listener.Listener,
    "Mux": mux.PythonCore,
}


def public_members(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


def compiled_face(name: str) -> Any:
    return muxcore._impl.EpollMux if name == "Mux" else getattr(muxcore, name)


@both
@pytest.mark.parametrize("name", FACES)
def test_faces_have_the_same_members(name: str) -> None:
    assert public_members(FACES[name]) == public_members(compiled_face(name))


@both
@pytest.mark.parametrize("name", FACES)
def test_methods_have_the_same_parameters(name: str) -> None:
    for member in public_members(FACES[name]):
        ours, theirs = getattr(FACES[name], member), getattr(compiled_face(name), member)
        if callable(ours):
            assert parameters(ours) == parameters(theirs), member


def parameters(method: Any) -> list[tuple[str, Any, Any]]:
    named = list(inspect.signature(method).parameters.values())[1:]  # without self, which C has by position alone
    return [(one.name, one.kind, one.default) for one in named]


@both
def test_help_says_the_same() -> None:
    """tests/fallback_docs.py writes muxcore/_fallback/docs.py anew."""
    assert fallback_docs.texts() == docs.TEXTS


@pytest.mark.parametrize("name", FACES)
def test_help_is_complete_on_the_fallback(name: str) -> None:
    slots = {"peer", "closed", "data", "eof", "error", "id", "mux", "address", "connections", "limits", "remote"}
    assert FACES[name].__doc__
    assert [member for member in public_members(FACES[name]) - slots if not getattr(FACES[name], member).__doc__] == []


def on_another_thread(fn: Callable[[], object]) -> str:
    """What came of it."""
    outcome: list[str] = []

    def call() -> None:
        try:
            fn()
        except Exception as error:
            outcome.append(type(error).__name__)
        else:
            outcome.append("done")

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return outcome[0]


ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "send": (b"x",), "send_many": ([b"x"],), "write": (b"x",), "writelines": ([b"x"],), "getsockopt": (1, 3),
    "setsockopt": (1, 9, 1), "call_later": (1, int), "call_at": (1, int), "call_soon": (int,), "add_reader": (0, int),
    "call_soon_threadsafe": (int,), "add_writer": (0, int), "remove_reader": (0,), "remove_writer": (0,),
    "broadcast": ([], b"x"), "drain": (0,), "poll": (0,), "listen": (LOCALHOST,), "connect": (LOCALHOST,),
}  # fmt: skip
LEFT_OUT = {  # what needs more of the world; and fileno, which is ValueError where there is no descriptor
    "sendfile", "attach", "run_in_executor", "add_signal_handler", "remove_signal_handler", "datagram", "run", "fileno",
}  # fmt: skip


def outcome(backend: str, name: str, member: str) -> str:
    """Of a public member that another thread reads or calls."""
    with muxcore.Mux(backend=backend) as owner:
        listening = owner.listen(LOCALHOST, print)
        made: dict[str, Any] = {
            "Mux": owner, "Listener": listening, "Connection": owner.connect(listening.address, print),
            "Datagram": owner.datagram(LOCALHOST, print),
        }  # fmt: skip
        owner.poll(0)
        if callable(getattr(type(made[name]), member)):
            return on_another_thread(partial(getattr(made[name], member), *ARGUMENTS.get(member, ())))
        return on_another_thread(partial(getattr, made[name], member))


def outcomes(backend: str) -> dict[str, str]:
    members = [(name, member) for name in FACES for member in sorted(public_members(FACES[name]) - LEFT_OUT)]
    return {f"{name}.{member}": outcome(backend, name, member) for name, member in members}


@both
def test_other_threads_may_do_the_same() -> None:
    """Promise threads."""
    compiled, ours = outcomes("epoll"), outcomes("poll")
    assert ours == compiled
    assert compiled["Connection.send"] == "done"
    assert compiled["Connection.pause_reading"] == "RuntimeError"
