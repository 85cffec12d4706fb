"""Which core runs, and why (Promise fallback)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from typing import ClassVar
from unittest.mock import create_autospec

import pytest
from support import receive

import muxcore
from muxcore._impl import BACKENDS

SHOW = "import muxcore, muxcore._impl as impl; print(impl.core, '|', impl.why, '|', muxcore.Mux(**{}).backend)"


def run(source: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MUXCORE_")}
    return subprocess.run(
        [sys.executable, "-W", "always::RuntimeWarning", "-c", source],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env=env | environment,
    )


def test_no_extensions_selects_the_fallback_in_silence() -> None:
    done = run(SHOW, MUXCORE_NO_EXTENSIONS="1")
    assert done.stdout.startswith("fallback | MUXCORE_NO_EXTENSIONS=1 is set | ")
    assert "RuntimeWarning" not in done.stderr


@pytest.mark.linux_only("elsewhere there is none to miss")
def test_a_missing_extension_warns_once_and_info_has_the_reason() -> None:
    """Promise fallback."""
    without = "import sys; sys.modules['muxcore._epoll'] = None\n"
    done = run(f"{without}{SHOW}\nimport muxcore")
    assert done.stdout.startswith("fallback | the compiled module does not import")
    assert done.stderr.count("RuntimeWarning: muxcore runs on its pure-Python core") == 1
    info = run(f"{without}from muxcore._cli._info import run; run()").stdout
    assert "\nwhy:         the compiled module does not import: " in info


@pytest.mark.skipif("epoll" not in BACKENDS, reason="there is no compiled core")
def test_a_subinterpreter_is_served_by_the_fallback_and_warned() -> None:
    """The compiled core refuses to be imported there."""
    inside = """
        import socket, warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import muxcore, muxcore._impl as impl
        with muxcore.Mux() as mux, socket.socket() as sock:
            listener = mux.listen(("127.0.0.1", 0), lambda conn, message: (conn.send(message), mux.stop()))
            sock.connect(listener.address)
            sock.sendall(b"hello")
            mux.run()
            print(impl.core, sock.recv(10), caught[0].message, flush=True)
    """
    outside = f"""
        try:
            import _interpreters as interpreters
        except ImportError:
            import _xxsubinterpreters as interpreters
        import muxcore  # Python 3.11 gives the compiled core to the first interpreter that imports it
        interpreter = interpreters.create()
        print(interpreters.run_string(interpreter, {textwrap.dedent(inside)!r}))
        interpreters.destroy(interpreter)
    """
    done = run(textwrap.dedent(outside))
    assert done.stdout.startswith("fallback b'hello' muxcore runs on its pure-Python core"), done
    assert "nterpreter" in done.stdout
    assert "compiler" not in done.stdout
    assert done.stdout.endswith("None\n")


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_muxcore_backend_sets_the_default(backend: str) -> None:
    assert run(SHOW, MUXCORE_BACKEND=backend).stdout.split()[-1] == backend


def test_an_unknown_backend_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"backend must be 'auto' or one of .*'select'.*, not 'iocp'"):
        muxcore.Mux(backend="iocp")
    done = run(SHOW, MUXCORE_BACKEND="iocp")
    assert "not 'iocp'" in done.stderr


def test_a_mux_is_a_mux_on_every_core(backend: str) -> None:
    with muxcore.Mux(backend=backend) as mux:
        assert isinstance(mux, muxcore.Mux)
        assert mux.backend == backend
        assert (type(mux).__name__ == "PythonCore") == (backend != "epoll")


# --- one class -------------------------------------------------------------------------------------


class Named(muxcore.Mux):
    """A user's."""

    def __init__(self, name: str, backend: str = "auto") -> None:
        super().__init__(backend=backend)
        self.name = name

    def poll(self, timeout: float | None = None) -> list[tuple[muxcore.Connection, int]]:
        return [*super().poll(timeout)]


def test_a_subclass_of_mux_is_one_on_every_core(backend: str) -> None:
    with Named("ours", backend=backend) as mux:
        assert isinstance(mux, Named)
        with Named("another", backend=backend) as another:
            assert type(another) is type(mux)
        assert (mux.name, mux.backend, type(mux).__name__) == ("ours", backend, "Named")
        listener = mux.listen(("127.0.0.1", 0), lambda conn, message: conn.send(message))
        with socket.create_connection(listener.address) as sock:
            sock.sendall(b"hello")
            assert receive(mux, sock, 5) == b"hello"


def test_the_subclasses_that_a_subclass_of_mux_hears_of_are_its_users(backend: str) -> None:
    class Base(muxcore.Mux):
        heard: ClassVar[list[str]] = []

        def __init_subclass__(cls, *, name: str) -> None:
            cls.heard.append(name)

    class Derived(Base, name="derived"):
        pass

    with Derived(backend=backend) as mux:
        assert type(mux).__qualname__ == Derived.__qualname__
    assert Base.heard == ["derived"]


@pytest.mark.skipif(len(BACKENDS) == 1, reason="there is one backend here")
def test_a_subclass_whose_backend_its_constructor_hides_says_so() -> None:
    class Hidden(muxcore.Mux):
        def __init__(self) -> None:
            super().__init__(backend=[*BACKENDS][-1])

    if next(iter(BACKENDS.values()))() is not [*BACKENDS.values()][-1]():
        with pytest.raises(TypeError, match=r"backend must also be an argument of Hidden\(\)"):
            Hidden()


def test_a_subclass_with_slots_gets_a_clear_error(backend: str) -> None:
    class Slotted(muxcore.Mux):
        __slots__ = ("name",)

    with pytest.raises(TypeError, match="Slotted cannot be a Mux: it has __slots__"):
        Slotted(backend=backend)


@pytest.mark.parametrize("name", ["backend", "closed", "poll", "stop", "close", "fileno", "stats"])
def test_mux_has_all_its_members_with_their_texts(name: str) -> None:
    assert getattr(muxcore.Mux, name).__doc__


def test_a_mux_can_be_specified_for_a_mock() -> None:
    mock = create_autospec(muxcore.Mux, instance=True)
    mock.stop()
    with pytest.raises(TypeError):
        mock.stop("an argument that it does not have")
