"""examples/proxy.py: a gigabyte from a fast server to a slow client, and what each end learns of the other's end."""

from __future__ import annotations

import hashlib
import re
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import DEADLINE, LOCALHOST, free_port, pattern, read_exactly, reset, until_it_listens

PROGRAM = Path(__file__).parent.parent / "examples" / "proxy.py"

pytestmark = [
    pytest.mark.skipif(not PROGRAM.exists(), reason="the examples are not beside the tests"),
    pytest.mark.unix_only("it ends a process by a signal"),
]

GIGABYTE = 1_000_000_000
MAY_GROW = 30_000_000  # bytes of memory of the proxy


@contextmanager
def proxy(server: Any) -> Iterator[tuple[int, psutil.Process]]:
    """The port and the process of a proxy before `server`, which must end well."""
    command = [sys.executable, str(PROGRAM), *map(str, server[:2])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline().split()[1]), psutil.Process(process.pid)
        process.terminate()
        process.communicate(timeout=20)
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(LOCALHOST) as server:
        server.settimeout(DEADLINE)
        yield server


@contextmanager
def through(server: socket.socket) -> Iterator[tuple[socket.socket, socket.socket, psutil.Process]]:
    """A client, the server's end of its connection, and the process in between."""
    with (
        proxy(server.getsockname()) as (port, process),
        socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as client,
        server.accept()[0] as accepted,
    ):
        accepted.settimeout(DEADLINE)
        yield client, accepted, process


class Flood(threading.Thread):
    """Sends as fast as it can, each block another one, and then a FIN. `stuck`: the kernel accepts no more."""

    def __init__(self, sock: socket.socket, size: int) -> None:
        super().__init__(daemon=True)
        self.sock = sock
        self.size = size
        self.sent = 0
        self.digest = hashlib.sha256()
        self.stuck = threading.Event()

    def run(self) -> None:
        self.sock.settimeout(0.05)
        block = bytearray(pattern(1_000_000))
        while self.sent < self.size:
            struct.pack_into(">Q", block, 0, self.sent)
            self.digest.update(block)
            left = memoryview(block)
            while left:
                try:
                    count = self.sock.send(left)
                except TimeoutError:
                    self.stuck.set()
                else:
                    left = left[count:]
                    self.sent += count
        self.sock.shutdown(socket.SHUT_WR)
        self.stuck.set()


def slow_read(sock: socket.socket, flood: Flood, process: psutil.Process) -> tuple[str, int, int]:
    """Read to the end; in the first half, now and then nothing until the sender is stuck. The digest, the bytes, and
    the peak of the proxy's memory."""
    digest, got, peak, buffer = hashlib.sha256(), 0, 0, memoryview(bytearray(1 << 18))
    pauses = iter(range(0, flood.size // 2, flood.size // 10))
    pause = next(pauses)
    while True:
        if got >= pause:
            flood.stuck.clear()
            assert flood.stuck.wait(DEADLINE)
            pause = next(pauses, 2 * flood.size)
        peak = max(peak, process.memory_info().rss)
        if not (count := sock.recv_into(buffer)):
            return digest.hexdigest(), got, peak
        digest.update(buffer[:count])
        got += count


@pytest.mark.parametrize(("direction", "size"), [("to the client", GIGABYTE), ("to the server", GIGABYTE // 5)])
def test_a_gigabyte_from_a_fast_sender_to_a_slow_reader_uses_no_memory(
    server: socket.socket, direction: str, size: int
) -> None:
    with through(server) as (client, accepted, process):
        before = process.memory_info().rss
        sender, reader = (accepted, client) if direction == "to the client" else (client, accepted)
        flood = Flood(sender, size)
        flood.start()
        digest, got, peak = slow_read(reader, flood, process)
        flood.join()
        assert got == flood.sent == size
        assert digest == flood.digest.hexdigest()
        assert peak - before < MAY_GROW


def test_megabytes_in_both_directions_at_once_do_not_block_each_other(server: socket.socket) -> None:
    data = pattern(20 << 20)
    got: dict[str, bytes] = {}

    def talk(name: str, sock: socket.socket) -> None:
        sender = threading.Thread(target=sock.sendall, args=(data,))
        sender.start()
        got[name] = read_exactly(sock, len(data))
        sender.join()

    with through(server) as (client, accepted, _):
        other = threading.Thread(target=talk, args=("server", accepted))
        other.start()
        talk("client", client)
        other.join()
    assert got["client"] == data
    assert got["server"] == data


def test_a_direction_goes_on_while_the_other_one_is_stuck(server: socket.socket) -> None:
    data = pattern(20 << 20)
    with through(server) as (client, accepted, _):
        accepted.settimeout(0.2)
        with pytest.raises(TimeoutError):
            accepted.sendall(bytes(100 << 20))
        accepted.settimeout(DEADLINE)
        sender = threading.Thread(target=client.sendall, args=(data,))
        sender.start()
        assert read_exactly(accepted, len(data)) == data
        sender.join()


def test_neither_end_reads_and_memory_stays(server: socket.socket) -> None:
    with through(server) as (client, accepted, process):
        before = process.memory_info().rss
        for sock in (client, accepted):
            sock.settimeout(0.2)
            with pytest.raises(TimeoutError):
                sock.sendall(bytes(100 << 20))
        assert process.memory_info().rss - before < MAY_GROW


def test_a_half_close_is_passed_on_in_both_directions(server: socket.socket) -> None:
    with through(server) as (client, accepted, _):
        client.sendall(b"request")
        client.shutdown(socket.SHUT_WR)
        assert read_exactly(accepted, 100) == b"request"
        accepted.sendall(b"answer")
        assert read_exactly(client, 6) == b"answer"
        accepted.sendall(b" and more")
        accepted.shutdown(socket.SHUT_WR)
        assert read_exactly(client, 100) == b" and more"
    with through(server) as (client, accepted, _):
        accepted.sendall(b"banner")
        accepted.shutdown(socket.SHUT_WR)
        assert read_exactly(client, 100) == b"banner"
        client.sendall(b"still here")
        client.shutdown(socket.SHUT_WR)
        assert read_exactly(accepted, 100) == b"still here"


def test_an_ended_pair_leaves_no_descriptor(server: socket.socket) -> None:
    with proxy(server.getsockname()) as (port, process):
        before = process.num_fds()
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as client, server.accept()[0] as end:
                client.sendall(b"x")
                client.shutdown(socket.SHUT_WR)
                assert read_exactly(end, 10) == b"x"
        while process.num_fds() > before:  # the time limit of the test bounds this
            pass


@pytest.mark.parametrize("end", ["client", "server"])
def test_a_reset_is_passed_on(server: socket.socket, end: str) -> None:
    with through(server) as (client, accepted, _):
        client.sendall(b"hello")
        assert read_exactly(accepted, 5) == b"hello"
        first, other = (client, accepted) if end == "client" else (accepted, client)
        reset(first)
        with pytest.raises(ConnectionResetError):
            other.recv(1)


def test_a_server_that_refuses_resets_the_client(server: socket.socket) -> None:
    address = server.getsockname()
    with proxy(address) as (port, _):
        server.close()
        with (  # the reset may be there before the call that connects has returned
            pytest.raises(ConnectionResetError),
            socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as client,
        ):
            client.recv(1)
        with (  # the proxy lives on
            socket.create_server(address) as again,
            socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as client,
            again.accept()[0] as end,
        ):
            client.sendall(b"x")
            assert read_exactly(end, 1) == b"x"


def test_what_is_queued_arrives_although_the_proxy_is_terminated(server: socket.socket) -> None:
    with through(server) as (client, accepted, process):
        accepted.sendall(b"last words")
        assert client.recv(1, socket.MSG_PEEK) == b"l"
        process.terminate()
        assert read_exactly(client, 100) == b"last words"
        client.close()
        accepted.close()
        assert process.wait(20) == 0  # before `through` terminates it again


NGINX = """
daemon off; master_process off; pid nginx.pid; error_log stderr;
events {}
http {
  access_log off; root .; keepalive_requests 100;
  client_body_temp_path body; proxy_temp_path proxy;
  fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
  server { listen 127.0.0.1:PORT; }
}
"""
WRK = """
response = function(status, headers, body)
  if status ~= 200 or body ~= "Hello, World!" then wrk.thread:stop() error("wrong reply") end
end
"""


@pytest.fixture
def nginx(peer_program: Callable[[str], str], tmp_path: Path) -> Iterator[tuple[str, int]]:
    """The address of an nginx that serves the files in tmp_path."""
    port, config = free_port(), tmp_path / "nginx.conf"
    config.write_text(NGINX.replace("PORT", str(port)))
    command = [peer_program("nginx"), "-e", "stderr", "-p", str(tmp_path), "-c", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        until_it_listens(process, port).close()
        yield "127.0.0.1", port
    finally:
        process.terminate()
        process.communicate(timeout=20)


def test_curl_gets_a_file_from_nginx(
    nginx: tuple[str, int], peer_program: Callable[[str], str], tmp_path: Path
) -> None:
    data = pattern(5 << 20)
    (tmp_path / "file").write_bytes(data)
    with proxy(nginx) as (port, _):
        url = f"http://127.0.0.1:{port}/file"
        command = [peer_program("curl"), "-sS", "--max-time", "20", url, "--next", "-sS", "--range", "1000-1999", url]
        done = subprocess.run(command, capture_output=True, timeout=40, check=True)
    assert done.stdout == data + data[1000:2000]


def test_wrk_gets_only_right_replies_from_nginx(
    nginx: tuple[str, int], peer_program: Callable[[str], str], tmp_path: Path
) -> None:
    (tmp_path / "hello").write_text("Hello, World!")
    (tmp_path / "check.lua").write_text(WRK)
    with proxy(nginx) as (port, _):  # nginx closes a connection after 100 requests, and wrk makes another
        command = [peer_program("wrk"), "-t1", "-c50", "-d1s", "-s", str(tmp_path / "check.lua")]
        command += [f"http://127.0.0.1:{port}/hello"]
        done = subprocess.run(command, capture_output=True, timeout=30, check=True, text=True)
    assert "wrong reply" not in done.stderr
    assert not re.search("Socket errors|Non-2xx", done.stdout), done.stdout
    found = re.search(r"(\d+) requests in", done.stdout)
    assert found is not None
    assert int(found[1]) > 100


def test_socat_gets_megabytes_back_through_proxy_and_echo(peer_program: Callable[[str], str]) -> None:
    data = pattern(5 << 20)
    command = [sys.executable, "-m", "muxcore", "echo", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as echo:
        try:
            assert echo.stdout is not None
            server = ("127.0.0.1", int(echo.stdout.readline().rpartition(":")[2]))
            with proxy(server) as (port, _):
                client = [peer_program("socat"), "-t", "20", "-", f"TCP:127.0.0.1:{port}"]
                done = subprocess.run(client, input=data, capture_output=True, timeout=40, check=True)
        finally:
            echo.terminate()
    assert done.stdout == data
