"""Programs of the guides that need more than a request and a reply: signals, restarts, other servers."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pytest
from support import LOCALHOST, free_port, read_exactly, until_it_listens

GUIDES = Path(__file__).parent.parent / "docs" / "guides"

pytestmark = [
    pytest.mark.skipif(not GUIDES.exists(), reason="the guides are not beside the tests"),
    pytest.mark.linux_only("some programs end by a signal, or raise a limit"),
]


def program(page: str, heading: str, **changes: str) -> str:
    """The first program below a heading, with other values of its constants."""
    text = (GUIDES / page).read_text().split(f"\n## {heading}\n")[1]
    found = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[0]
    for name, value in changes.items():
        found, count = re.subn(rf"^{name} = .*$", f"{name} = {value}", found, flags=re.MULTILINE)
        assert count == 1, name
    return found


def at(port: int, text: str) -> str:
    """The program, with its address."""
    text, count = re.subn(r'\("127\.0\.0\.1", 8888\)', f'("127.0.0.1", {port})', text)
    assert count == 1
    return text


@contextmanager
def running(text: str, *, raises: bool = False) -> Iterator[subprocess.Popen[bytes]]:
    """A program in another process, which must end well by the end of the block; what a handler raises is logged."""
    command = [sys.executable, "-c", text]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        yield process
        complaint = process.communicate(timeout=20)[1].decode()
        assert process.returncode == 0, complaint
        assert ("Traceback" in complaint) == raises
    finally:
        process.kill()
        process.communicate()


def read_to_the_end(sock: socket.socket) -> bytes:
    with sock.makefile("rb") as file:
        return file.read()


# --- production ------------------------------------------------------------------------------------


class Activated:
    """What systemd does: it owns a listening socket, and starts a program with that as descriptor 3."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    @contextmanager
    def start(self, text: str) -> Iterator[subprocess.Popen[bytes]]:
        script = f'exec 3<&{self.sock.fileno()}; LISTEN_PID=$$ LISTEN_FDS=1 exec "$0" -c "$1"'
        command = ["bash", "-c", script, sys.executable, text]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, pass_fds=[self.sock.fileno()])
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


def test_a_socket_of_systemd_survives_a_restart_and_its_backlog_waits() -> None:
    text = program("production.md", "A server to start from")
    with socket.create_server(LOCALHOST) as listening:
        address, service = listening.getsockname(), Activated(listening)
        with service.start(text) as process, socket.create_connection(address, timeout=20) as sock:
            sock.sendall(b"first\n")
            assert read_exactly(sock, 6) == b"first\n"
            process.terminate()
            assert sock.recv(1) == b""
            sock.close()
            assert process.wait(20) == 0
        with socket.create_connection(address, timeout=20) as sock:
            sock.sendall(b"meanwhile\n")
            with service.start(text) as process:
                assert read_exactly(sock, 10) == b"meanwhile\n"
                process.terminate()
                sock.close()
                assert process.wait(20) == 0


def test_the_counters_are_logged_on_a_signal() -> None:
    port = free_port()
    with running(at(port, program("production.md", "A server to start from"))) as process:
        with until_it_listens(process, port) as sock:
            sock.sendall(b"hello\n")
            assert read_exactly(sock, 6) == b"hello\n"
            process.send_signal(signal.SIGUSR1)
            assert process.stderr is not None
            assert process.stderr.readline() == f"INFO root listening on ('127.0.0.1', {port})\n".encode()
            line = process.stderr.readline().decode()
            assert line.startswith("INFO root Stats(")
            assert "messages_in=1," in line
        process.terminate()


def test_what_the_guide_counts_is_counted() -> None:
    import muxcore

    table = (GUIDES / "production.md").read_text().split("\n## Counters\n")[1].split("\n## ")[0]
    named = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    with muxcore.Mux() as mux:
        assert named <= mux.stats()._asdict().keys()
    assert len(named) > 10


# --- testing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heading", "passed"),
    [
        ("A handler", 4), ("Slow peers and timeouts", 2), ("A framer of your own", 3), ("TLS", 1),
        ("A server in a process of its own", 1),
    ],
)
def test_the_tests_of_the_guide_pass(tmp_path: Path, heading: str, passed: int) -> None:
    (tmp_path / "test_it.py").write_text(program("testing.md", heading))
    command = [sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=50, check=False)
    assert f"{passed} passed in" in done.stdout, done.stdout


# --- recipes ---------------------------------------------------------------------------------------


def test_heartbeat_ends_the_peer_that_does_not_reply() -> None:
    port = free_port()
    with running(at(port, program("recipes.md", "Heartbeat", INTERVAL="0.4"))) as process:
        with until_it_listens(process, port) as alive, socket.create_connection(("127.0.0.1", port), 20) as silent:
            for _ in range(4):
                assert read_exactly(alive, 5) == b"PING\n"
                alive.sendall(b"PONG\n")
            assert read_to_the_end(silent) in (b"PING\n" * 2, b"PING\n" * 3)
            alive.sendall(b"hello\n")
            assert b"hello\n" in alive.makefile("rb").readline()
            name = silent.getsockname()
        process.terminate()
        assert process.stdout is not None
        assert process.stdout.read() == f"no reply from {name}\n".encode()


def request(file: BinaryIO) -> bytes:
    return file.read(int.from_bytes(file.read(4), "big"))


def test_a_client_gets_replies_in_any_order() -> None:
    with socket.create_server(LOCALHOST) as listening:
        listening.settimeout(20)
        text = at(listening.getsockname()[1], program("recipes.md", "Request and reply"))
        with running(text) as process, listening.accept()[0] as sock, sock.makefile("rb") as file:
            for message in reversed([request(file) for _ in range(3)]):
                sock.sendall(len(message).to_bytes(4, "big") + message.upper())
            assert process.communicate(timeout=20)[0] == b"b'ONE'\nb'TWO'\nb'THREE'\n"


@pytest.mark.parametrize(("reply", "error"), [(b"", "ConnectionClosed"), (b"\0\0\0\1x", "KeyError")])
def test_a_client_is_notified_that_its_server_is_gone(reply: bytes, error: str) -> None:
    with socket.create_server(LOCALHOST) as listening:
        listening.settimeout(20)
        text = at(listening.getsockname()[1], program("recipes.md", "Request and reply"))
        text = text.replace("print(future.result(timeout=10))", "print(type(future.exception(timeout=10)).__name__)")
        with (
            running(text, raises=error == "KeyError") as process,
            listening.accept()[0] as sock,
            sock.makefile("rb") as file,
        ):
            for _ in range(3):
                request(file)
            sock.sendall(reply)
            sock.shutdown(socket.SHUT_WR)
            assert process.stdout is not None
            assert process.stdout.read() == f"{error}\n".encode() * 3


def test_a_client_comes_back() -> None:
    port = free_port()
    text = at(port, program("recipes.md", "Reconnect", FIRST="0.01", LONGEST="0.1"))
    with running(text) as process:
        assert process.stdout is not None
        time.sleep(0.3)  # no server listens yet
        for visit in range(3):
            with socket.create_server(("127.0.0.1", port)) as listening:
                listening.settimeout(20)
                with listening.accept()[0] as sock:
                    assert read_exactly(sock, 10) == b"subscribe\n"
                    sock.sendall(b"visit %d\n" % visit)
                    assert process.stdout.readline() == b"visit %d\n" % visit
        process.terminate()


def test_a_soft_drain_finishes_what_it_has_accepted() -> None:
    port = free_port()
    with (
        running(at(port, program("recipes.md", "Soft drain", WORK="1.0"))) as process,
        until_it_listens(process, port) as busy,
        socket.create_connection(("127.0.0.1", port), 20) as idle,
    ):
        idle.sendall(b"0\n")
        assert read_exactly(idle, 7) == b"done 0\n"
        busy.sendall(b"1\n2\n")
        time.sleep(0.3)
        process.terminate()
        assert idle.recv(1) == b""
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), 20)
        assert read_to_the_end(busy) == b"done 1\ndone 2\n"


def test_the_grace_of_a_soft_drain_ends() -> None:
    port = free_port()
    text = at(port, program("recipes.md", "Soft drain", WORK="30", GRACE="0.2"))
    with running(text) as process, until_it_listens(process, port) as busy:
        busy.sendall(b"1\n")
        time.sleep(0.1)
        process.terminate()
        assert read_to_the_end(busy) == b""


def test_a_line_goes_to_its_room_and_a_slow_consumer_is_reset() -> None:
    port, line = free_port(), b"x" * 60000 + b"\n"
    with running(at(port, program("recipes.md", "Rooms"))) as process:
        with (
            until_it_listens(process, port) as speaker,
            socket.create_connection(("127.0.0.1", port), 20) as slow,
            socket.create_connection(("127.0.0.1", port), 20) as other,
        ):
            for sock, room in ((slow, b"a"), (other, b"b")):
                sock.sendall(room + b"\n" + room * 3 + b"\n")
                assert read_exactly(sock, 4) == room * 3 + b"\n"
            speaker.sendall(b"a\n")
            for _ in range(400):  # 24 MB
                speaker.sendall(line)
                assert len(read_exactly(speaker, len(line))) == len(line)
            other.sendall(b"alone\n")
            assert read_exactly(other, 6) == b"alone\n"
            with pytest.raises(ConnectionResetError):
                read_to_the_end(slow)
        process.terminate()


def test_a_rate_limit_delays_and_loses_nothing() -> None:
    port = free_port()
    with running(at(port, program("recipes.md", "Rate limit", RATE="50.0", BURST="5.0"))) as process:
        with until_it_listens(process, port) as sock:
            lines = b"".join(b"%d\n" % number for number in range(30))
            start = time.monotonic()
            sock.sendall(lines)
            assert read_exactly(sock, len(lines)) == lines
            assert 0.45 < time.monotonic() - start < 5  # 25 of them wait
        process.terminate()
