"""What may live here: clients of other projects, against `python -m muxcore echo`."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import free_port, pattern, read_exactly, until_it_listens

DATA = pattern(5 << 20)
Find = Callable[[str], str]


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of an echo server in its own process, which must end well."""
    command = [sys.executable, "-m", "muxcore", "echo", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield int(process.stdout.readline().rpartition(":")[2])
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 0


def test_socat_gets_five_megabytes_back_through_a_half_close(peer_program: Find, echo: int) -> None:
    command = [peer_program("socat"), "-t", "20", "-", f"TCP:127.0.0.1:{echo}"]
    done = subprocess.run(command, input=DATA, capture_output=True, timeout=40, check=True)
    assert done.stdout == DATA


@pytest.mark.linux_only("other systems' nc has other options")
def test_netcat_gets_its_lines_back(peer_program: Find, echo: int) -> None:
    command = [peer_program("nc"), "-N", "127.0.0.1", str(echo)]
    done = subprocess.run(command, input=b"one\ntwo\n", capture_output=True, timeout=20, check=True)
    assert done.stdout == b"one\ntwo\n"


@contextmanager
def haproxy(program: str, server: int, folder: Path) -> Iterator[socket.socket]:
    """A connection to the server through a TCP proxy."""
    port, config = free_port(), folder / "haproxy.cfg"
    config.write_text(
        "defaults\n mode tcp\n timeout connect 5s\n timeout client 30s\n timeout server 30s\n"
        f"listen echo\n bind 127.0.0.1:{port}\n server muxcore 127.0.0.1:{server}\n"
    )
    process = subprocess.Popen([program, "-db", "-q", "-f", str(config)], stderr=subprocess.PIPE)
    try:
        with until_it_listens(process, port) as sock:
            yield sock
    finally:
        process.kill()
        process.communicate()


def test_haproxy_passes_everything_on(peer_program: Find, echo: int, tmp_path: Path) -> None:
    with haproxy(peer_program("haproxy"), echo, tmp_path) as sock:
        for start in range(0, len(DATA), 100_000):
            piece = DATA[start : start + 100_000]
            sock.sendall(piece)
            assert read_exactly(sock, len(piece)) == piece
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b""
