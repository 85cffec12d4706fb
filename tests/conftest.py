"""What may live here: fixtures: a Mux per backend, and the count of descriptors around every test."""

from __future__ import annotations

import gc
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from support import LOCALHOST, open_fds

import muxcore
from muxcore._impl import BACKENDS

# No deadline: on a busy machine one example in thousands takes long, and that is no failure.
settings.register_profile("muxcore", deadline=None, database=None)
settings.load_profile("muxcore")

# Programs other than Python (curl) do not even start with the library that `make sanitize` preloads.
if "MUXCORE_TEST_PYTHON" in os.environ:
    sys.executable = os.environ["MUXCORE_TEST_PYTHON"]
    del os.environ["LD_PRELOAD"]


def pytest_runtest_setup(item: pytest.Item) -> None:
    for name, is_here in (("linux_only", sys.platform == "linux"), ("unix_only", os.name == "posix")):
        mark = item.get_closest_marker(name)
        if mark is not None and not is_here:
            pytest.skip(f"{name}: {mark.args[0]}")


@pytest.fixture(params=[name for name in ("epoll", "select", "poll", "kqueue") if name in BACKENDS])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def mux(backend: str) -> Iterator[muxcore.Mux]:
    with muxcore.Mux(backend=backend) as mux:
        yield mux


@pytest.fixture
def listen(mux: muxcore.Mux) -> Callable[..., muxcore.Listener]:
    """Listen on a free port of 127.0.0.1."""

    def listen(handler: Any = None, **options: Any) -> muxcore.Listener:
        return mux.listen(LOCALHOST, handler, **options)

    return listen


@pytest.fixture(autouse=True, scope="module")
def small_heap() -> None:
    """The collector passes over the objects that exist already. Tests collect thousands of times, some at each
    allocation, and pytest's objects cost most of that time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_leaked_descriptor() -> Iterator[None]:
    if os.name != "posix":
        yield  # Windows numbers sockets and files apart, and lists neither
        return
    before = set(open_fds())
    yield
    if set(open_fds()) - before:
        gc.collect()
    leaked = set(open_fds()) - before
    assert not leaked, f"descriptors leaked: {sorted(leaked)}"


@pytest.fixture
def socket_path() -> Iterator[Path]:
    """Where a Unix socket may be. (macOS' directories for temporary files have names too long for one.)"""
    if not hasattr(socket, "AF_UNIX"):
        pytest.skip("this Python has no Unix sockets")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder) / "socket"


@pytest.fixture
def peer_program() -> Callable[[str], str]:
    """The path of a program that is a real client; a skip (in CI a failure) where it is not installed."""

    def find(name: str) -> str:
        path = shutil.which(name)
        if path is None:
            if os.environ.get("MUXCORE_REQUIRE_PEERS") == "1":
                pytest.fail(f"{name} is not installed, and MUXCORE_REQUIRE_PEERS=1 requires it")
            pytest.skip(f"{name} is not installed")
        return path

    return find
