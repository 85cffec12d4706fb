"""The soak of tests/soak, for some seconds, and that it sees what it is for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from muxcore._impl import BACKENDS

PROGRAM = Path(__file__).parent / "soak" / "run.py"

pytestmark = pytest.mark.linux_only("it reads /proc")


def soak(seconds: float, *arguments: str) -> tuple[int, str]:
    """Its exit code, and what it printed."""
    command = [sys.executable, str(PROGRAM), str(seconds / 60), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=55)
    return done.returncode, done.stdout


@pytest.mark.parametrize("backend", [name for name in ("epoll", "select") if name in BACKENDS])
def test_a_whole_server_loses_nothing_and_stays_flat(backend: str) -> None:
    code, output = soak(5, "--backend", backend)
    assert code == 0, output
    assert f"\n{backend}, " in output


@pytest.mark.parametrize(
    ("mistake", "finding"),
    [
        ("memory", "private grew by"),
        ("fd", "descriptors when all clients had ended"),
        ("loss", "bytes lost"),
        ("swap", "other bytes came back than were sent"),
        ("missing", "times on_close was missing"),
        ("doubled", "times on_close was doubled"),
    ],
)
def test_a_planted_mistake_is_found(mistake: str, finding: str) -> None:
    code, output = soak(5 if mistake == "memory" else 2, "--plant", mistake)
    assert code == 1, output
    assert finding in output
