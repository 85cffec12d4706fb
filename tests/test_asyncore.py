"""examples/asyncore_before.py and asyncore_after.py: a client sees the same, but for what the first one loses."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import threading
from collections.abc import Callable

import pytest
from support import DEADLINE, about_examples, example, read_exactly

BEFORE, AFTER = "asyncore_before.py", "asyncore_after.py"
LINES = b"".join(b"line %07d\n" % number for number in range(600_000))

pytestmark = [
    *about_examples,
    pytest.mark.skipif(importlib.util.find_spec("asyncore") is None, reason="pyasyncore is not installed"),
]


@pytest.mark.parametrize("program", [BEFORE, AFTER])
def test_netcat_sees_the_same(peer_program: Callable[[str], str], program: str) -> None:
    with example(program, complains=True) as port:  # of asyncore's age
        command = [peer_program("nc"), "-N", "127.0.0.1", str(port)]
        done = subprocess.run(command, input=b"one\n\ntwo three\n", capture_output=True, timeout=20, check=True)
    assert done.stdout == b"ONE\n\nTWO THREE\n"


def half_closed_before_it_reads(port: int, patience: float) -> bytes:
    """What a client gets that sends everything, then its FIN, and only reads once the server has received all that, or
    its patience has ended."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        sock.settimeout(DEADLINE)
        sock.connect(("127.0.0.1", port))

        def send() -> None:
            sock.sendall(LINES)
            sock.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        sender.join(patience)
        with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as other:
            for _ in range(len(LINES) // 8192 + 100):  # each is a turn of the server's loop, which reads from us, too
                other.sendall(b"a\n")
                assert read_exactly(other, 2) == b"A\n"
        got = bytearray()
        try:
            while data := sock.recv(1 << 16):
                got += data
        except ConnectionResetError:
            pass
        sender.join()
        return bytes(got)


def test_before_loses_what_a_slow_client_has_not_read() -> None:
    with example(BEFORE, complains=True) as port:
        assert len(half_closed_before_it_reads(port, DEADLINE)) < len(LINES)


def test_after_loses_nothing() -> None:
    with example(AFTER) as port:
        assert half_closed_before_it_reads(port, 0.5) == LINES.upper(), "it waits for us to read"
