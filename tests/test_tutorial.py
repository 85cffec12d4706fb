"""The programs of the tutorial run, and each earlier one shows its failure to real clients."""

from __future__ import annotations

import array
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import DEADLINE, read_exactly, reset

PROGRAMS = Path(__file__).parent.parent / "examples" / "tutorial"
DATA = array.array("I", range(6 << 20)).tobytes()  # more than kernels buffer; a loss, a repetition or a swap shows
STALL = 0.3  # seconds of silence that count as one
ALL = sorted(path.name for path in PROGRAMS.glob("*.py"))
CAREFUL = ["3_poll.py", "4_epoll_level.py", "5_epoll_edge.py", "6_muxcore.py"]

pytestmark = [
    pytest.mark.skipif(not ALL, reason="the examples are not beside the tests"),
    pytest.mark.linux_only("half of the tutorial is about epoll"),
]


class Server:
    """A program of the tutorial in its own process."""

    def __init__(self, program: str, *options: str) -> None:
        command = [sys.executable, str(PROGRAMS / program), *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        word, port = self.process.stdout.readline().split()
        assert word == "listening"
        self.port = int(port)
        self.clients: list[socket.socket] = []

    def connect(self) -> socket.socket:
        sock = socket.socket()
        self.clients.append(sock)
        sock.settimeout(DEADLINE)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        sock.connect(("127.0.0.1", self.port))
        return sock

    def pause(self) -> None:
        """Returns when the process stands still: what happens from now on will be one batch of events for it."""
        self.process.send_signal(signal.SIGSTOP)
        _, status = os.waitpid(self.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def end(self, number: int = signal.SIGTERM) -> None:
        """It ends by a signal, and has nothing to complain of."""
        self.resume()
        for sock in self.clients:
            sock.close()
        self.process.send_signal(number)
        try:
            _, errors = self.process.communicate(timeout=DEADLINE)
        finally:
            self.process.kill()
            self.process.communicate()
        assert errors == ""
        assert self.process.returncode in (0, -number)


Start = Callable[..., Server]


@pytest.fixture
def start() -> Iterator[Start]:
    servers: list[Server] = []

    def start(program: str, *options: str) -> Server:
        servers.append(Server(program, *options))
        return servers[-1]

    yield start
    for server in servers:
        server.end()


def echoed(sock: socket.socket, line: bytes) -> bytes:
    sock.sendall(line)
    return read_exactly(sock, len(line))


def silent(sock: socket.socket) -> bool:
    """Whether nothing comes, not even an end of file, for as long as a stall is."""
    return not select.select([sock], [], [], STALL)[0]


def slow_client(sock: socket.socket, data: bytes) -> bytes:
    """Send everything before reading anything, unless the server waits for us to read; then a FIN; read to the end."""
    sock.settimeout(0)
    left, got, reading = memoryview(data), bytearray(), False
    while True:
        readable, writable, _ = select.select([sock] if reading else [], [sock] if left else [], [], STALL)
        if writable:
            left = left[sock.send(left) :]
            if not left:
                sock.shutdown(socket.SHUT_WR)
                reading = True
        elif not readable:
            assert not reading or select.select([sock], [], [], DEADLINE)[0], f"stalled after {len(got)} bytes"
            reading = True
        if readable:
            received = sock.recv(1 << 16)
            if not received:
                return bytes(got)
            got += received


@pytest.mark.parametrize("program", ALL)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_program_echoes_and_ends_at_a_signal(program: str, number: int) -> None:
    server = Server(program)
    try:
        sock = server.connect()
        assert echoed(sock, b"hello\n") == b"hello\n"
    finally:
        server.end(number)


def test_1_the_second_client_waits_until_the_first_leaves(start: Start) -> None:
    server = start("1_blocking.py")
    first, second = server.connect(), server.connect()
    assert echoed(first, b"first\n") == b"first\n"
    second.sendall(b"second\n")
    assert silent(second)
    assert echoed(first, b"again\n") == b"again\n"
    first.close()
    assert read_exactly(second, 7) == b"second\n"


@pytest.mark.parametrize("program", ALL[1:])
def test_all_others_serve_both(start: Start, program: str) -> None:
    server = start(program)
    first, second = server.connect(), server.connect()
    assert echoed(first, b"first\n") == b"first\n"
    assert echoed(second, b"second\n") == b"second\n"
    assert echoed(first, b"again\n") == b"again\n"


def test_2_ignoring_what_send_returns_loses_bytes(start: Start) -> None:
    assert 0 < len(slow_client(start("2_select.py").connect(), DATA)) < len(DATA)


@pytest.mark.parametrize("program", CAREFUL)
def test_the_same_client_gets_every_byte_from_the_careful_ones(start: Start, program: str) -> None:
    got = slow_client(start(program).connect(), DATA)
    assert len(got) == len(DATA)
    assert got == DATA  # after the length: pytest would explain a difference of megabytes for minutes


def kick_and_connect(server: Server) -> socket.socket:
    """In one batch of events: one client kicks another, a stranger connects, and the kicked one had sent a RST."""
    victim, kicker = server.connect(), server.connect()
    for sock in (victim, kicker):
        assert echoed(sock, b"hello\n") == b"hello\n"
    server.pause()
    kicker.sendall(b"kick\n")
    stranger = server.connect()  # the kernel accepts it; the server will hear of it
    reset(victim)
    server.resume()
    assert read_exactly(kicker, 9).startswith(b"kicked ")  # one, or none if its RST was seen first
    return stranger


def test_4_a_stale_event_closes_a_stranger(start: Start) -> None:
    stranger = kick_and_connect(start("4_epoll_level.py"))
    assert stranger.recv(1) == b""  # it had done nothing at all


def test_6_a_stale_event_reaches_no_connection(start: Start) -> None:
    stranger = kick_and_connect(start("6_muxcore.py"))
    assert echoed(stranger, b"hello\n") == b"hello\n"


def send_at_once(server: Server, size: int) -> socket.socket:
    """A client whose `size` bytes are all there when the server hears of them."""
    sock = server.connect()
    assert echoed(sock, b"hello\n") == b"hello\n"
    server.pause()
    sock.sendall(bytes(size))
    server.resume()
    return sock


def test_5_an_edge_that_is_not_drained_stalls_until_new_data_comes(start: Start) -> None:
    sock = send_at_once(start("5_epoll_edge.py", "--no-drain"), 10_000)
    assert len(read_exactly(sock, 4096)) == 4096
    assert silent(sock)
    sock.sendall(b"!")
    assert len(read_exactly(sock, 4096)) == 4096
    assert silent(sock)


@pytest.mark.parametrize("program", ["5_epoll_edge.py", "6_muxcore.py"])
def test_a_drained_edge_does_not_stall(start: Start, program: str) -> None:
    assert len(read_exactly(send_at_once(start(program), 10_000), 10_000)) == 10_000


def test_5_one_that_never_stops_sending_does_not_keep_the_others_waiting(start: Start) -> None:
    server = start("5_epoll_edge.py")
    quiet = server.connect()
    assert echoed(quiet, b"hello\n") == b"hello\n"
    server.pause()
    loud = server.connect()
    loud.settimeout(0)
    try:
        while True:
            loud.send(bytes(1 << 16))
    except BlockingIOError:
        pass  # its buffers are full: hundreds of kilobytes for the server to find
    quiet.sendall(b"and me?\n")
    server.resume()
    assert read_exactly(quiet, 8) == b"and me?\n"
