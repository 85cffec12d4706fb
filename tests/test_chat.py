"""examples/chat.py: netcat and socat talk to each other, and nobody waits for a slow reader."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Callable

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


def test_a_slow_reader_is_told_what_it_missed_and_nobody_waits_for_it() -> None:
    with (
        example("chat.py") as port,
        socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as slow,
        socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as fast,
        socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as speaker,
        slow.makefile("rb") as slow_lines,
        fast.makefile("rb") as fast_lines,
    ):
        for sock, name, lines in ((slow, b"slow\n", slow_lines), (fast, b"fast\n", fast_lines)):
            sock.sendall(name)
            lines.readline()
            assert lines.readline() == b"* " + name.strip() + b" is here\n"
        speaker.sendall(b"speaker\n")
        assert fast_lines.readline() == b"* speaker is here\n"
        filling = b"x" * 900
        for i in range(0, 10_000, 10):
            speaker.sendall(b"".join(b"%05d %b\n" % (n, filling) for n in range(i, i + 10)))
            for n in range(i, i + 10):
                assert fast_lines.readline() == b"speaker: %05d %b\n" % (n, filling)
        slow_lines.readline(), slow_lines.readline()  # who came meanwhile
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
