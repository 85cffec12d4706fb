"""The command line, in real processes; test_demo.py has the demo."""

from __future__ import annotations

import importlib.metadata
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from muxcore._cli import _echo, main
from muxcore._impl import BACKENDS, core

MUXCORE = [sys.executable, "-m", "muxcore"]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)


@contextmanager
def started(*command: str) -> Iterator[subprocess.Popen[str]]:
    """A process with pipes that is gone afterwards, whatever happens."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


# --- echo ------------------------------------------------------------------------------------------


@pytest.mark.unix_only("it ends a process by a signal")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_echo_replies_and_ends_with_a_summary(number: signal.Signals) -> None:
    with started(*MUXCORE, "echo", "--port", "0") as process:
        assert process.stdout is not None
        listening = re.fullmatch(r"listening on 127\.0\.0\.1:(\d+)\n", process.stdout.readline())
        assert listening
        with socket.create_connection(("127.0.0.1", int(listening[1])), timeout=10) as sock:
            sock.sendall(b"hello")
            assert sock.recv(5, socket.MSG_WAITALL) == b"hello"
            process.send_signal(number)
            assert sock.recv(100) == b""
        output, errors = process.communicate(timeout=20)
    assert re.fullmatch(r"connections: 1, messages: 1, bytes in: 5, bytes out: 5, seconds: \d+\.\d\n", output)
    assert errors == ""
    assert process.returncode == 0


def test_echo_on_a_port_in_use_fails_with_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = run(*MUXCORE, "echo", "--port", f"{port}")
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(rf"muxcore echo: cannot listen on \('127\.0\.0\.1', {port}\): .+\n", done.stderr)


def test_echo_with_a_host_that_does_not_resolve(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert _echo.run("nowhere", 0) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"muxcore echo: .*'nowhere': Name or service not known\n", err)


def test_echo_with_a_host_that_is_no_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert _echo.run("a" * 64 + ".example", 0) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"muxcore echo: .*host.*\n", err)


def test_echo_shows_an_ipv6_address_in_brackets() -> None:
    assert _echo._shown(("::1", 80)) == "[::1]:80"


def test_nothing_listens_beyond_loopback_unless_host_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/threat-model.md"""
    hosts: list[str] = []
    monkeypatch.setattr(_echo, "run", lambda host, port: hosts.append(host) or 0)
    assert main(["echo"]) == main(["echo", "--port", "0"]) == main(["echo", "--host", "0.0.0.0"]) == 0
    assert hosts == ["127.0.0.1", "127.0.0.1", "0.0.0.0"]


# --- usage -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [[], ["nonsense"], ["echo", "--port", "x"], ["echo", "--port", "65536"], ["echo", "--port", "-1"]]
)
def test_usage_errors(arguments: list[str]) -> None:
    done = run(*MUXCORE, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("usage: python -m muxcore")
    assert "Traceback" not in done.stderr


def test_a_bad_port_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["echo", "--port", "http"])
    assert caught.value.code == 2
    assert "'http' is not a port: a number from 0 to 65535" in capsys.readouterr().err


def test_help_has_an_example() -> None:
    done = run(*MUXCORE, "--help")
    assert done.returncode == 0
    assert "python -m muxcore echo --port 8888" in done.stdout
    assert all(command in done.stdout for command in ("echo", "info", "demo"))


def test_version() -> None:
    done = run(*MUXCORE, "--version")
    assert (done.returncode, done.stdout) == (0, f"muxcore {importlib.metadata.version('muxcore')}\n")


def test_version_of_a_tree_that_is_not_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert main(["info"]) == 0
    assert re.search(r"^muxcore: +unknown", capsys.readouterr().out)


# --- info ------------------------------------------------------------------------------------------


def test_info_names_what_runs_and_the_limits() -> None:
    done = run(*MUXCORE, "info")
    assert (done.returncode, done.stderr) == (0, "")
    lines = dict(re.split(r": +", line, maxsplit=1) for line in done.stdout.splitlines())
    assert lines["muxcore"] == importlib.metadata.version("muxcore")
    assert lines["core"] == core
    assert lines["why"]
    assert lines["backend"] == next(iter(BACKENDS))
    assert lines["open files"]
    assert "high=65536, low=16384" in lines["Limits"]
    assert "linger=5.0" in lines["Timeouts"]
    assert lines.keys() >= {"python", "kernel", "somaxconn", "local ports"}


@pytest.mark.unix_only("resource limits")
def test_info_shows_how_many_files_may_be_open() -> None:
    import resource

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert re.search(rf"^open files: +{limit}, can be raised to", run(*MUXCORE, "info").stdout, re.MULTILINE)


def test_info_without_resource_limits() -> None:
    program = "import sys; sys.modules['resource'] = None; from muxcore._cli import main; sys.exit(main(['info']))"
    done = run(sys.executable, "-c", program)
    assert done.returncode == 0
    assert re.search(r"^open files: +unknown$", done.stdout, re.MULTILINE)
