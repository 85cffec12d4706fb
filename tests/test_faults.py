"""System calls that fail as their man pages allow, made to by LD_PRELOAD (DESIGN 4.3, 4.11, 6)."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import pattern, read_exactly

from muxcore._impl import core

pytestmark = [
    pytest.mark.skipif(core != "compiled", reason="the fallback calls Python's socket methods, not libc's"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler to build the faults with"),
]

SERVER = """
import logging, muxcore
logging.basicConfig(level=logging.ERROR)
class Echo(muxcore.Handler):
    def on_message(self, conn, message): conn.send(message)
    def on_close(self, conn, exc): print("closed", repr(exc), flush=True)
    def on_open(self, conn): print("opened", flush=True)
muxes = []
def ready(mux, listener):
    muxes.append(mux)
    print("listening", listener.address[1], flush=True)
muxcore.serve(Echo(), ("127.0.0.1", 0), ready=ready)
print(muxes[0].stats(), flush=True)
"""

DATAGRAMS = """
import signal, muxcore
class Echo:
    def on_datagrams(self, datagram, messages):
        for data, address in messages: datagram.send(data, address)
    def on_error(self, datagram, exc): print("error", repr(exc), flush=True)
with muxcore.Mux() as mux:
    mux.add_signal_handler(signal.SIGTERM, mux.stop)
    print("listening", mux.datagram(("127.0.0.1", 0), Echo()).address[1], flush=True)
    mux.run()
    print(mux.stats(), flush=True)
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    source = Path(__file__).with_name("faults.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


@contextmanager
def server(shim: Path, fault: str, program: str = SERVER) -> Iterator[tuple[int, list[str]]]:
    """An echo server with a fault: its port; and, once it has ended, what it printed."""
    env = os.environ | {"LD_PRELOAD": str(shim), "FAULT": fault}
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    )
    assert process.stdout is not None
    lines: list[str] = []
    try:
        yield int(process.stdout.readline().split()[1]), lines
    finally:
        process.terminate()
        out, _ = process.communicate(timeout=20)
        lines.extend(out.splitlines())
    assert process.returncode == 0, lines


def echoed(port: int, data: bytes = pattern(3000)) -> bool:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        return read_exactly(sock, len(data) + 1) == data


def counted(lines: list[str], name: str) -> int:
    match = re.search(rf"\b{name}=(\d+)", lines[-1])
    assert match is not None
    return int(match[1])


@pytest.mark.parametrize(
    "fault",
    [
        f"send:{errno.ENOBUFS}:1:3",
        f"send:{errno.ENOMEM}:1:3",
        f"send:{errno.EINTR}:1:9",
        f"send:{errno.EAGAIN}:1:1",
        f"recv:{errno.EINTR}:1:9",
        f"recv:{errno.EAGAIN}:1:3",
        f"accept4:{errno.EINTR}:1:9",
        f"accept4:{errno.ECONNABORTED}:1:9",
        f"accept4:{errno.EMFILE}:1:2",
        f"accept4:{errno.EAGAIN}:1:1",
    ],
)
def test_a_passing_fault_loses_nothing(shim: Path, fault: str) -> None:
    with server(shim, fault) as (port, lines):
        assert echoed(port)
    assert counted(lines, "waits") < 200, "it does not spin either"
    assert lines.count("closed None") == 1


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.ENOSPC])
def test_a_connection_that_cannot_be_watched_is_closed_and_its_handler_told(shim: Path, code: int) -> None:
    with server(shim, f"add:{code}:1:1") as (port, lines):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
            try:
                assert sock.recv(1) == b""
            except ConnectionResetError:
                pass
        assert echoed(port), "the next one is served"
    told = [line for line in lines if line.startswith(("opened", "closed"))]
    assert told == ["opened", f"closed {OSError(code, os.strerror(code))!r}", "opened", "closed None"]


def test_a_connection_whose_interest_cannot_be_changed_ends_with_the_reason(shim: Path) -> None:
    with server(shim, f"mod:{errno.ENOMEM}:1:1") as (port, lines):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
            sock.settimeout(20)
            with pytest.raises(OSError, match=r"reset by peer|Broken pipe"):
                while True:
                    sock.sendall(bytes(1 << 16))
        assert echoed(port)
    assert any("Cannot allocate memory" in line for line in lines if line.startswith("closed"))


def answers(port: int, count: int) -> list[bytes]:
    """Send b"0", b"1", ... to an echo of datagrams; the first `count` that come back."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(20)
        sock.connect(("127.0.0.1", port))
        for i in range(3):
            sock.send(b"%d" % i)
        return [sock.recv(100) for _ in range(count)]


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (f"recvmmsg:{errno.EINTR}:1:9", 0),
        (f"recvmmsg:{errno.EAGAIN}:1:3", 0),
        (f"recvmmsg:{errno.ENOMEM}:1:2", 2),
        (f"sendmmsg:{errno.EINTR}:1:9", 0),
        (f"sendmmsg:{errno.EAGAIN}:1:1", 0),
        (f"sendmmsg:{errno.ENOBUFS}:1:3", 0),
        (f"sendmmsg:{errno.ECONNREFUSED}:1:1", 1),
    ],
)
def test_a_passing_fault_loses_no_datagram(shim: Path, fault: str, told: int) -> None:
    with server(shim, fault, DATAGRAMS) as (port, lines):
        assert answers(port, 3) == [b"0", b"1", b"2"]
    assert counted(lines, "waits") < 50, "it does not spin either"
    assert (len(lines), counted(lines, "datagram_errors"), counted(lines, "drops")) == (told + 1, told, 0)


def test_a_datagram_that_is_refused_again_is_given_up(shim: Path) -> None:
    with server(shim, f"sendmmsg:{errno.EPERM}:1:2", DATAGRAMS) as (port, lines):
        assert answers(port, 2) == [b"1", b"2"]
    assert lines[0] == f"error {OSError(errno.EPERM, os.strerror(errno.EPERM))!r}"
    assert (len(lines), counted(lines, "drops")) == (2, 1)
