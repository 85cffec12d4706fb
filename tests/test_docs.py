"""The programs of the pages in docs/ run as they stand there, and the numbers are those that were measured."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
from support import LOCALHOST, datagram_reply, free_port, read_exactly, until_it_listens

import muxcore._impl

ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT / "docs")): path.read_text()
    for path in sorted((ROOT / "docs").rglob("*.md"))
    if "_build" not in path.parts  # what `make docs` makes has copies of pages, whose links lead elsewhere
}

pytestmark = [
    pytest.mark.skipif(not PAGES, reason="the pages are not beside the tests"),
    pytest.mark.linux_only("some programs fork, or end by a signal"),
]


class Server(NamedTuple):
    """A server: what one client sends it, and what must come back, as a pattern."""

    question: bytes
    reply: bytes
    size: int
    handles_sigterm: bool = True  # else the signal ends it


class Client(NamedTuple):
    """A client: what it sends, the reply that it gets, and what it prints before it ends."""

    question: bytes
    reply: bytes
    output: str


def server(question: bytes, reply: bytes, *, handles_sigterm: bool = True) -> Server:
    return Server(question, re.escape(reply), len(reply), handles_sigterm)


ECHO = server(b"hello\n", b"hello\n")
UPPER = server(b"hello\n", b"HELLO\n")
BY_HAND = server(b"hello\n", b"hello\n", handles_sigterm=False)
UPPER_BY_HAND = server(b"hello\n", b"HELLO\n", handles_sigterm=False)
PID = Server(b"hello\n" * 2, rb"(\d+: hello\n)\1", 0)
GREETS = Client(b"hello", b"hello", "connected to ('127.0.0.1', {port})\nb'hello'\n")
DIGEST = server(b"a\n", b"7d4e0e32dee361f3af09c60f6636755efc7af32a0af0b1f0f7fd90eef3009613\n")

# What each program of a page has to do, in their order: serve a client (TCP or UDP), be one, or print something.
PROGRAMS: dict[str, list[Server | Client | bytes | str]] = {
    "index.md": [ECHO],
    "install.md": ["running on True\n"],
    "tutorial.md": [BY_HAND],
    "threat-model.md": [BY_HAND],
    "guides/addresses.md": [GREETS, "connected to '\\x00muxcore example'\nConnectionRefusedError\n"],
    "guides/faces.md": [
        ECHO, ECHO, ECHO, server(b"hello\n", b"anonymous: hello\n"), UPPER, BY_HAND, BY_HAND, BY_HAND, BY_HAND,
        "b'ready'\nreload\n",
    ],
    "guides/framing.md": [
        UPPER,
        server(b"21\nx\n", b"42\nerror: not a number\n"),
        server(b"1 2 3\n4 5\n", b"6\n9\n"),
        server(b"3\nabc2\nde", b"3 bytes, the last is b'c'\n2 bytes, the last is b'e'\n"),
        server(b"5:hello,0:,", b"5:hello,0:,"),
    ],
    "guides/backpressure.md": [server(b"2\n", b"2\n1\n0\n"), ECHO],
    "guides/timeouts.md": [ECHO, server(b"", b"3\n2\n1\n")],
    "guides/threads.md": [
        server(b"abc\n1\n", b"cba\n1\n"), DIGEST, server(b"go\n", b"news 1\nnews 2\nnews 3\n")
    ],
    "guides/coroutines.md": [UPPER_BY_HAND, "b'hello, world'\n"],
    "guides/workers.md": [PID, PID],
    "guides/free-threading.md": [ECHO],
    "guides/production.md": [ECHO, server(b"PROXY TCP4 192.0.2.1 198.51.100.1 40000 443\r\nhi\n", b"192.0.2.1: hi\n")],
    "guides/datagrams.md": [b"HELLO", "ConnectionRefusedError\n"],
    "coming-from/asyncore.md": [BY_HAND, ECHO],
    "coming-from/selectors.md": [BY_HAND, BY_HAND, BY_HAND],
    "coming-from/socketserver.md": [UPPER_BY_HAND, UPPER, server(b"1\n2\n", b"1\n3\n")],
    "coming-from/asyncio.md": [UPPER_BY_HAND, UPPER, UPPER_BY_HAND],
}


# Pages whose programs test_guides.py and test_tls_peers.py run.
ELSEWHERE = {"guides/recipes.md": 6, "guides/testing.md": 5, "guides/tls.md": 7}


def programs_of(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


CASES = [
    pytest.param(program, PROGRAMS[name][number], id=f"{name}-{number + 1}")
    for name, page in PAGES.items()
    for number, program in enumerate(programs_of(page))
    if number < len(PROGRAMS.get(name, []))
]


def test_every_program_is_run() -> None:
    assert {name: len(programs_of(page)) for name, page in PAGES.items() if programs_of(page)} == {
        name: len(expected) for name, expected in PROGRAMS.items()
    } | ELSEWHERE


@pytest.mark.parametrize(("program", "expected"), CASES)
def test_a_program_of_the_pages_does_what_it_says(program: str, expected: Server | Client | bytes | str) -> None:
    if "import asyncore" in program and find_spec("asyncore") is None:
        pytest.skip("asyncore has left Python")
    if 'backend="epoll"' in program and "epoll" not in muxcore._impl.BACKENDS:
        pytest.skip("asyncio can drive the compiled core only")
    if isinstance(expected, Client):
        return serve_a_client(program, expected)
    port = free_port()
    program = re.sub(r'\("127\.0\.0\.1", [1-9]\d*\)', f'("127.0.0.1", {port})', program)
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        if isinstance(expected, str):
            output, complaint = process.communicate(timeout=20)
            assert (output.decode(), complaint.decode(), process.returncode) == (expected, "", 0)
        elif isinstance(expected, bytes):
            assert datagram_reply(process, port, b"hello") == expected
        else:
            with until_it_listens(process, port) as sock:
                sock.sendall(expected.question)
                reply = read_exactly(sock, expected.size) if expected.size else read_lines(sock, expected.question)
                assert re.fullmatch(expected.reply, reply)
            process.terminate()
            complaint = process.communicate(timeout=20)[1].decode()
            assert process.returncode == (0 if expected.handles_sigterm else -signal.SIGTERM), complaint
            assert "Traceback" not in complaint
    finally:
        process.kill()
        process.communicate(timeout=20)


def serve_a_client(program: str, expected: Client) -> None:
    with socket.create_server(LOCALHOST) as server:
        server.settimeout(20)
        port = server.getsockname()[1]
        program = program.replace('("localhost", 8888)', f'("localhost", {port})')
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        try:
            with server.accept()[0] as sock:
                assert read_exactly(sock, len(expected.question)) == expected.question
                sock.sendall(expected.reply)
            assert process.communicate(timeout=20)[0] == expected.output.format(port=port)
            assert process.returncode == 0
        finally:
            process.kill()
            process.communicate(timeout=20)


def test_the_client_of_the_guide_prints_why_it_could_not_connect() -> None:
    program = programs_of(PAGES["guides/addresses.md"])[0].replace("8888", str(free_port()))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=True)
    assert re.fullmatch(r"could not connect: .*refused.*\n", done.stdout)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("program", programs_of(PAGES.get("guides/workers.md", "")), ids=["reuse_port", "exclusive"])
def test_a_signal_to_all_workers_of_the_guide_loses_nothing(program: str, number: int) -> None:
    """Ctrl-C in a terminal: the parent gets it, too, and sends another to each worker."""
    port, size = free_port(), 4_000_000
    program = program.replace('("127.0.0.1", 8888)', f'("127.0.0.1", {port})')
    program = program.replace('conn.send(b"%d: %s" % (os.getpid(), line))', f"conn.write(bytes({size}))")
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    try:
        with until_it_listens(process, port) as sock:
            until_all_serve(process.pid, 2)
            sock.sendall(b"go\n")
            got = len(sock.recv(1000))
            os.killpg(process.pid, number)
            while data := sock.recv(1 << 16):
                got += len(data)
        assert got == size
        assert process.communicate(timeout=20) == (b"", b"")
        assert process.returncode == 0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=20)


def until_all_serve(parent: int, count: int) -> None:
    """Wait until so many children of a process catch SIGTERM, as serve() does and Python by itself does not."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        states = [Path(f"/proc/{child}/status").read_text() for child in children]
        caught = [int(re.search(r"SigCgt:\s*(\w+)", state)[1], 16) for state in states]  # type: ignore[index]
        if sum(mask >> signal.SIGTERM - 1 & 1 for mask in caught) == count:
            return
    raise AssertionError("the workers never served")


def read_lines(sock: socket.socket, question: bytes) -> bytes:
    """As many lines as were sent."""
    with sock.makefile("rb") as file:
        return b"".join(file.readline() for _ in question.splitlines())


# --- numbers and links -----------------------------------------------------------------------------


def test_the_numbers_are_those_of_the_results() -> None:
    """A row that was measured anew has to be copied from benchmarks/results, with its date."""
    page = PAGES["performance.md"]
    sections = re.split(r"^(?=`benchmarks/bench_)", page, flags=re.MULTILINE)[1:]
    assert len(sections) > 5
    for section in sections:
        [name] = re.findall(r"\.\./benchmarks/results/([\w-]+)\.md", section)
        result = (ROOT / "benchmarks" / "results" / f"{name}.md").read_text()
        assert re.findall(r"\d{4}-\d\d-\d\d", section)[0] in result.splitlines()[2], name
        rows = [line for line in section.splitlines() if line.startswith("|")]
        assert [row for row in rows if row not in result.splitlines()] == [], name


def rows_with_results(page: str) -> Iterator[tuple[dict[str, str], Path]]:
    """Rows whose last column links to results, or is still to get such a link: their cells, and that file."""
    for table in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        head, _, *rows = ([cell.strip() for cell in line.strip("|\n ").split("|")] for line in table.splitlines())
        for row in rows:
            if found := re.search(r"bench_\w+\.py`?(?:\]\((?:\.\./)?(.*)\))?", row[-1]):
                yield dict(zip(head[:-1], row[:-1], strict=True)), ROOT / (found[1] or "to be measured")


@pytest.mark.parametrize(("name", "least"), [("README.md", 3), ("docs/performance.md", 15)])
def test_the_numbers_of_tables_are_those_of_the_results(name: str, least: int) -> None:
    number = r"\d+(?:,\d{3})*(?:\.\d+)?x?"
    found = list(rows_with_results((ROOT / name).read_text()))
    assert len(found) >= least
    for cells, path in found:
        if "to be measured" in cells.values():
            continue
        [work, *said] = (cell for column, cell in cells.items() if column not in ("goal", "reached"))
        assert set(re.findall(number, " ".join(said))) <= set(re.findall(number, path.read_text())), work


@pytest.mark.parametrize("name", ["README.md", "docs/performance.md"])
def test_a_number_in_a_sentence_is_in_the_results_that_its_section_links_to(name: str) -> None:
    """Ratios, percentages and what has a decimal point or a separator; not versions."""
    for section in re.split(r"^(?=#)", (ROOT / name).read_text(), flags=re.MULTILINE):
        results = (ROOT / "benchmarks" / "results" / file for file in re.findall(r"results/([\w-]+\.md)", section))
        measured = set(re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", " ".join(path.read_text() for path in results)))
        versions = r"(?:\d+\.){2,}\d+|(?:Python|Linux|uvloop) \d+\.\d+"
        for what in (r"```(?:.|\n)*?```", r"^\|.*\n", r"`[^`]*`", r"\]\([^)]*\)", versions):
            section = re.sub(what, "", section, flags=re.MULTILINE)
        said = {number.rstrip("x%") for number in re.findall(r"\d+\.\d+x?|\d+,\d{3}|\d+%", section)}
        assert said <= measured, section.partition("\n")[0]


def processor(result: Path) -> str:
    """AMD EPYC or Intel Xeon: on which one this was measured."""
    return "AMD EPYC" if "cpu AMD EPYC" in result.read_text().splitlines()[2] else "Intel Xeon"


def test_each_table_of_goals_is_of_one_machine() -> None:
    page = PAGES["performance.md"]
    sections = re.findall(r"^### On the (.*)\n((?:(?!^#).*\n)+)", page, re.MULTILINE)
    assert [machine for machine, _ in sections] == ["Intel Xeon", "AMD EPYC"]
    for machine, section in sections:
        assert {processor(path) for _, path in rows_with_results(section)} == {machine}
    assert len(list(rows_with_results(page))) == sum(len(list(rows_with_results(section))) for _, section in sections)


def test_the_programs_that_ran_on_the_other_machine_are_named() -> None:
    page = " ".join(PAGES["performance.md"].split())
    results = {ROOT / "benchmarks" / "results" / file for file in re.findall(r"results/([\w-]+\.md)", page)}
    [named] = re.findall(r"or of an AMD EPYC for (.*?) \(each", page)
    there = {f"bench_{path.stem}.py" for path in results if processor(path) == "AMD EPYC"}
    assert set(re.findall(r"bench_\w+\.py", named)) == there


def tables(name: str) -> list[dict[str, dict[str, str]]]:
    """Those of a file of results: a cell by server and column."""
    text = (ROOT / "benchmarks" / "results" / f"{name}.md").read_text()
    found = []
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, _, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines())
        found.append({row[0]: dict(zip(head, row, strict=True)) for row in rows})
    return found


def test_trust_is_one_screen() -> None:
    page = PAGES["trust.md"]
    assert len(page.splitlines()) <= 40
    assert len(page.replace("|", " ").split()) <= 550


def test_what_is_said_of_datagrams_is_what_was_measured() -> None:
    names = "each from another client", "in bursts of 16", "in a flood"
    for name, table in zip(names, tables("udp"), strict=False):
        row = table["muxcore"]
        assert f"| {name} | {row['to C']} | {row['to uvloop']} |" in PAGES["guides/datagrams.md"]


def test_what_is_said_of_an_idle_connections_memory_is_what_was_measured() -> None:
    size = tables("memory")[0]["muxcore callback"]["bytes/connection"]
    assert f"| memory per idle connection, user space | {size} bytes | " in PAGES["ARCHITECTURE.md"]
    assert f"| an idle connection | {size} bytes in user space (compiled core) |" in PAGES["threat-model.md"]


def test_what_is_said_of_threads_is_what_was_measured() -> None:
    one, two = (tables("threads")[0][threads]["messages/s"] for threads in "12")
    free_one, free_two = (tables("threads-free")[0][threads] for threads in "12")
    said = (
        f"made {two} messages/s in two threads, and {one} in one. Without a GIL the numbers were "
        f"{free_two['messages/s']} and {free_one['messages/s']}, a ratio of {free_two['to one thread']} ("
    )
    assert said in " ".join(PAGES["guides/free-threading.md"].split())


def test_what_is_said_of_idle_sockets_is_what_was_measured() -> None:
    poll, epoll = (tables("scaling")[0][name]["15,000"] for name in ("select.poll", "select.epoll"))
    said = f"An event among 15,000 idle sockets costs {poll} µs with `select.poll` and {epoll} µs with `select.epoll`"
    assert said in " ".join(PAGES["tutorial.md"].split())


def test_what_is_said_of_the_kernels_share_is_what_was_measured() -> None:
    c = tables("echo")[0]["C epoll"]
    share = round(100 * float(c["system"]) / float(c["CPU us/message"]))
    page = " ".join((ROOT / "benchmarks" / "README.md").read_text().split())
    assert f"about {share}% of the C server's CPU time is system time" in page


def test_what_is_said_of_latencies_is_what_was_measured() -> None:
    echo = tables("echo")[0]
    c, ours, uvloop = (echo[server] for server in ("C epoll", "muxcore callback", "uvloop Protocol"))
    said = (
        f"the median latency is {ours['p50 us']} µs (C {c['p50 us']}, uvloop {uvloop['p50 us']}) and the 99th "
        f"percentile {ours['p99 us']} µs (C {c['p99 us']}, uvloop {uvloop['p99 us']})"
    )
    assert said in " ".join(PAGES["performance.md"].split())
    asleep = {server: row["p50 us"] for server, row in tables("latency")[0].items()}
    said = (
        f"the median is {asleep['muxcore, sleeps']} µs (C {asleep['C epoll, sleeps']}, uvloop "
        f"{asleep['uvloop Protocol']}), and with `busy_poll` {asleep['muxcore, busy_poll']} µs (C that spins "
        f"{asleep['C epoll, spins']})"
    )
    assert said in " ".join(PAGES["performance.md"].split())


def test_all_examples_are_listed_with_their_lines() -> None:
    row = r"^\| \[(\w+\.py)\]\(\.\./examples/\1\) \| .* \| (\d+) \| .* \|$"
    listed = re.findall(row, PAGES["examples.md"], re.MULTILINE)
    files = (ROOT / "examples").glob("*.py")
    assert dict(listed) == {path.name: str(len(path.read_text().splitlines())) for path in files}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere_on_disk(name: str) -> None:
    """As the repository's own web view follows them; Sphinx looks at those among the pages."""
    here = (ROOT / "docs" / name).parent
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", PAGES[name])
    assert [link for link in links if not (here / link).exists()] == []
