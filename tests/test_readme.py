"""The programs of the README run as they stand there, and its numbers are those that were measured."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support import free_port, read_exactly, until_it_listens

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8") if README.exists() else ""
PROGRAMS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)

pytestmark = pytest.mark.skipif(not PROGRAMS, reason="the README is not beside the tests")


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_of_the_readme_replies(program: str) -> None:
    port = free_port()
    program = re.sub(r'\("127\.0\.0\.1", \d+\)', f'("127.0.0.1", {port})', program)
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        with until_it_listens(process, port) as sock:
            question, reply = (b"set k v\r\nGET k\r\n", b"+OK\r\n$1\r\nv\r\n") if "Resp" in program else [b"hello"] * 2
            sock.sendall(question)
            assert read_exactly(sock, len(reply)) == reply
    finally:
        process.terminate()
        process.communicate(timeout=20)


# --- numbers, sizes and links ----------------------------------------------------------------------


def rows(name: str) -> list[list[str]]:
    """Those of all tables of a file of results."""
    lines = (README.parent / "benchmarks" / "results" / f"{name}.md").read_text().splitlines()
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines if line.startswith("| ")]


def measured(name: str, *keys: str, column: int) -> str:
    """A cell of the first row that begins with these cells."""
    return next(row[column] for row in rows(name) if row[: len(keys)] == list(keys))


def test_each_of_the_three_numbers_is_what_was_measured() -> None:
    cpu = [
        measured("echo", server, column=1)
        for server in ("muxcore callback", "C epoll", "uvloop Protocol", "asyncio Protocol")
    ]
    redis = [
        measured("resp", f"{command}, 16 deep", "muxcore, each request", column=4) for command in ("SET", "GET", "INCR")
    ]
    memory = [
        measured("memory", server, column=1)
        for server in ("muxcore callback", "C epoll", "uvloop Protocol", "asyncio Protocol")
    ]
    said = {
        "echo": "| {} µs | C {}, uvloop {}, asyncio {} |".format(*cpu),
        "resp": "| SET {}, GET {}, INCR {} | redis-server 1.00x |".format(*redis),
        "memory": "| {} bytes | C {}, uvloop {}, asyncio {} |".format(*memory),
    }
    lines = TEXT.splitlines()
    for name, numbers in said.items():
        [row] = [line for line in lines if f"(benchmarks/results/{name}.md)" in line]
        assert numbers in row
        assert f"[`bench_{name}.py`]" in row


def test_the_numbers_are_of_the_day_it_says() -> None:
    [day] = re.findall(r"Medians, (\d{4}-\d\d-\d\d), two shared cores of an Intel Xeon", TEXT)
    for name in ("echo", "resp", "memory"):
        where = (README.parent / "benchmarks" / "results" / f"{name}.md").read_text().splitlines()[2]
        assert where.startswith(f"date {day}; cpu Intel(R) Xeon(R) Processor, 2 cores; kernel Linux 6.18"), name


def test_it_is_read_in_a_few_minutes() -> None:
    assert len(TEXT.splitlines()) <= 120
    assert len(TEXT.split()) <= 900


def test_its_links_lead_somewhere_on_disk() -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", TEXT)
    assert len(links) > 10
    assert [link for link in links if not (README.parent / link).exists()] == []


def test_the_extras_that_the_pages_install_exist() -> None:
    there = tomllib.loads((README.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pages = [README, *(README.parent / "docs").glob("**/*.md")]
    named = {
        extra for page in pages for extras in re.findall(r"install '[^']*\[(.*?)\]", page.read_text(encoding="utf-8"))
        for extra in extras.split(",")
    }
    assert named
    assert named <= there.keys()
