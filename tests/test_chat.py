"""examples/chat.py: netcat and socat talk to each other, and no client waits for a slow reader."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from support import DEADLINE, about_examples, example

pytestmark = about_examples


def test_netcat_and_socat_talk(peer_program: Callable[[str], str], backend: str) -> None:
    pipe = subprocess.PIPE
    with example("chat.py", backend=backend) as port:
        commands = [peer_program("nc"), "127.0.0.1", str(port)], [peer_program("socat"), "-", f"TCP:127.0.0.1:{port}"]
        ann, bob = (subprocess.Popen(command, stdin=pipe, stdout=pipe) for command in commands)
        with ann, bob:
            assert ann.stdin is not None
            assert ann.stdout is not None
            assert bob.stdin is not None
            assert bob.stdout is not None
            try:
                ann.stdin.write(b"ann\n")
                ann.stdin.flush()
                assert [ann.stdout.readline() for _ in range(2)] == [b"* what is your name?\n", b"* ann is here\n"]
                bob.stdin.write(b"bob\r\nhello\r\n")
                bob.stdin.flush()
                assert [bob.stdout.readline() for _ in range(2)] == [b"* what is your name?\n", b"* bob is here\n"]
                assert [ann.stdout.readline() for _ in range(2)] == [b"* bob is here\n", b"bob: hello\n"]
                ann.kill()
                assert bob.stdout.readline() == b"* ann has left\n"
            finally:
                ann.kill()
                bob.kill()


@contextmanager
def netcat(program: str, port: int) -> Iterator[tuple[Any, Any]]:
    """What it sends, and what it has received. Only the test reads its output."""
    pipe = subprocess.PIPE
    with subprocess.Popen([program, "127.0.0.1", str(port)], stdin=pipe, stdout=pipe) as process:
        try:
            yield process.stdin, process.stdout
        finally:
            process.kill()


def test_a_slow_reader_is_sent_how_much_it_missed_and_delays_no_other(peer_program: Callable[[str], str]) -> None:
    with (
        example("chat.py") as port,
        netcat(peer_program("nc"), port) as (slow, slow_lines),
        socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as fast,
        socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as speaker,
        fast.makefile("rb") as fast_lines,
    ):
        slow.write(b"slow\n")
        slow.flush()
        assert [slow_lines.readline() for _ in range(2)] == [b"* what is your name?\n", b"* slow is here\n"]
        fast.sendall(b"fast\n")
        assert [fast_lines.readline() for _ in range(2)] == [b"* what is your name?\n", b"* fast is here\n"]
        speaker.sendall(b"speaker\n")
        assert fast_lines.readline() == b"* speaker is here\n"
        filling = b"x" * 900
        for i in range(0, 10_000, 10):
            speaker.sendall(b"".join(b"%05d %b\n" % (n, filling) for n in range(i, i + 10)))
            for n in range(i, i + 10):
                assert fast_lines.readline() == b"speaker: %05d %b\n" % (n, filling)
        slow_lines.readline(), slow_lines.readline()  # the names of the two clients that came
        number = missed = 0
        while number < 10_000:
            line = slow_lines.readline()
            if found := re.fullmatch(rb"\* you were too slow for (\d+) lines\n", line):
                missed += int(found[1])
                number += int(found[1])
            else:
                assert line == b"speaker: %05d %b\n" % (number, filling)
                number += 1
        assert (number, missed > 0) == (10_000, True)
        speaker.sendall(b"again\n")
        assert slow_lines.readline() == b"speaker: again\n"
