"""The programs of the README run as they stand there."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support import LOCALHOST, answered_datagram, free_port, read_exactly, until_it_listens

README = Path(__file__).parent.parent / "README.md"
PROGRAMS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if README.exists() else []


CLIENTS = [program for program in PROGRAMS if "connect(" in program]

pytestmark = pytest.mark.skipif(not PROGRAMS, reason="the README is not beside the tests")


@pytest.mark.parametrize("program", [program for program in PROGRAMS if program not in CLIENTS])
def test_a_program_of_the_readme_answers(program: str) -> None:
    port = free_port()
    program = re.sub(r'\("127\.0\.0\.1", \d+\)', f'("127.0.0.1", {port})', program)
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        if "mux.datagram" in program:
            assert answered_datagram(process, port, b"hello") == b"hello"
            return
        with until_it_listens(process, port) as sock:
            question, answer = (b"set k v\r\nGET k\r\n", b"+OK\r\n$1\r\nv\r\n") if "Resp" in program else [b"hello"] * 2
            sock.sendall(question)
            assert read_exactly(sock, len(answer)) == answer
    finally:
        process.terminate()
        process.communicate(timeout=20)


@pytest.mark.parametrize("program", CLIENTS)
def test_a_client_of_the_readme_gets_its_answer(program: str) -> None:
    with socket.create_server(LOCALHOST) as server:
        server.settimeout(20)
        port = server.getsockname()[1]
        program = program.replace('("localhost", 8888)', f'("localhost", {port})')
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        with server.accept()[0] as sock:
            assert read_exactly(sock, 5) == b"hello"
            sock.sendall(b"hello")
        assert process.communicate(timeout=20)[0] == f"connected to ('127.0.0.1', {port})\nb'hello'\n"
        assert process.returncode == 0


def tables(name: str) -> list[dict[str, dict[str, str]]]:
    """Those of a file of results: a cell by server and column."""
    text = (README.parent / "benchmarks" / "results" / f"{name}.md").read_text()
    found = []
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, _, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines())
        found.append({row[0]: dict(zip(head, row, strict=True)) for row in rows})
    return found


def test_what_it_says_of_datagrams_is_what_was_measured() -> None:
    alone, bursts, flood = (table["muxcore"] for table in tables("udp")[:3])
    said = (
        f"costs {alone['to C']} the CPU time of a `recvmmsg` loop in C and {alone['to uvloop']} of uvloop's if each "
        f"comes from another client, {bursts['to C']} and {bursts['to uvloop']} in bursts of 16, "
        f"{flood['to C']} and {flood['to uvloop']} in a flood"
    )
    assert said in " ".join(README.read_text().split())


def test_what_it_says_of_latencies_is_what_was_measured() -> None:
    echo = tables("echo")[0]
    c, ours, uvloop = (echo[server] for server in ("C epoll", "muxcore callback", "uvloop Protocol"))
    said = (
        f"the median latency is {ours['p50 us']} µs (C {c['p50 us']}, uvloop {uvloop['p50 us']}) and the 99th "
        f"percentile {ours['p99 us']} µs (C {c['p99 us']}, uvloop {uvloop['p99 us']};"
    )
    assert said in " ".join(README.read_text().split())


def test_all_examples_are_listed_with_their_lines() -> None:
    listed = re.findall(r"^\| \[(\w+\.py)\]\(examples/\1\) \| .* \| (\d+) \| .* \|$", README.read_text(), re.MULTILINE)
    files = (README.parent / "examples").glob("*.py")
    assert dict(listed) == {path.name: str(len(path.read_text().splitlines())) for path in files}
