"""The command line, in real processes, and the demo's load, which must see what a bad server does."""

from __future__ import annotations

import importlib.metadata
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from muxcore._cli import _demo, _demo_load, _echo, main
from muxcore._impl import BACKENDS, core

MUXCORE = [sys.executable, "-m", "muxcore"]
MIX = _demo_load.Mix(chatty=28, messages=20, bulk=4, bulk_mib=2, slow=4, slow_mib=1, reset=4)
CHATTY = _demo_load.Mix(chatty=4, messages=50, bulk=0, bulk_mib=1, slow=0, slow_mib=1, reset=0)

# An echo server that changes what it sends back: `mangle` gets some data and its position in the stream.
BAD_SERVER = """
import os, signal, socketserver

def hang_up():
    raise OSError

others = []

def mangle(data, at):
    return {expression}

class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        at = 0
        try:
            while data := self.request.recv(65536):
                self.request.sendall(mangle(data, at))
                at += len(data)
        except OSError:
            pass

class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True

signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
with Server(("127.0.0.1", 0), Echo) as server:
    print("listening on 127.0.0.1:%d" % server.server_address[1], flush=True)
    server.serve_forever()
"""
DROPS = "data[1:] if at > 1000 else data"


def bad_server(expression: str) -> list[str]:
    return [sys.executable, "-c", BAD_SERVER.format(expression=expression)]


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


def load_on(command: list[str], mix: _demo_load.Mix, seconds: float = 30) -> _demo_load.Result:
    deadline = time.monotonic() + seconds
    with _demo._server("tested", command, deadline) as (_, address):
        return _demo_load.run_load(address, mix, deadline, lambda _: None)


# --- echo ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_echo_answers_and_ends_with_a_summary(number: signal.Signals) -> None:
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
    assert re.fullmatch(rf"muxcore echo: .*{port}.*Address already in use\n", done.stderr)


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
    assert lines["open files"].startswith(f"{resource.getrlimit(resource.RLIMIT_NOFILE)[0]}, ")
    assert "high=65536, low=16384" in lines["Limits"]
    assert "linger=5.0" in lines["Timeouts"]
    assert lines.keys() >= {"python", "kernel", "somaxconn", "local ports"}


# --- the load --------------------------------------------------------------------------------------


def test_the_load_gets_everything_back_from_muxcore() -> None:
    result = load_on(_demo.SERVERS["muxcore"], MIX)
    check_complete(result)


def test_the_load_gets_everything_back_from_asyncio() -> None:
    result = load_on(_demo.SERVERS["asyncio"], MIX)
    check_complete(result)


def check_complete(result: _demo_load.Result) -> None:
    assert not result.failures
    assert result.lost == 0
    assert result.resets == MIX.reset
    assert result.messages == MIX.chatty * MIX.messages + MIX.bulk * MIX.bulk_mib + MIX.slow * MIX.slow_mib
    assert result.verified > (MIX.bulk * MIX.bulk_mib + MIX.slow * MIX.slow_mib) * _demo_load.MIB
    assert list(result.latencies_ns) == sorted(result.latencies_ns)


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("data[:-1] + bytes([data[-1] ^ 1]) if at > 1000 else data", "other bytes came back than were sent"),
        (DROPS, "other bytes came back than were sent"),
        ("data[:1] + data if at > 1000 else data", "more came back than was sent"),
        ("data[1::-1] + data[2:] if at > 1000 else data", "other bytes came back than were sent"),
        ("others.append(data) or others[0][:len(data)]", "other bytes came back than were sent"),
        ("hang_up() if at > 1000 else data", "closed by the server before everything was back"),
    ],
    ids=["corrupted", "dropped", "doubled", "swapped", "foreign", "hung up"],
)
def test_the_load_sees_what_a_bad_server_does(expression: str, reason: str) -> None:
    result = load_on(bad_server(expression), CHATTY)
    assert result.lost > 0
    assert reason in result.failures


def test_the_load_sees_a_byte_too_many_at_the_end() -> None:
    # Only the last read of a stream is not followed by another message, so the surplus comes alone.
    mix = _demo_load.Mix(chatty=1, messages=1, bulk=0, bulk_mib=1, slow=0, slow_mib=1, reset=0)
    result = load_on(bad_server("data + b'!'"), mix)
    assert result.lost > 0
    assert result.failures == {"more came back than was sent": 1}


def test_the_load_does_not_wait_for_a_silent_server_beyond_its_deadline() -> None:
    result = load_on(bad_server("b''"), CHATTY, seconds=2)
    assert result.failures == {"unfinished at the deadline": CHATTY.chatty}
    assert result.lost > 0
    assert result.messages == result.verified == 0


def test_the_load_on_a_port_where_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        address = gone.getsockname()
    result = _demo_load.run_load(address, CHATTY, time.monotonic() + 30, lambda _: None)
    assert result.failures.total() == CHATTY.chatty
    assert result.messages == 0


def test_idle_connections_check_their_message() -> None:
    deadline = time.monotonic() + 30
    with (
        pytest.raises(_demo.DemoFailed, match="did not get its one message back"),
        _demo._server("tested", bad_server("data[::-1]"), deadline) as (_, address),
        _demo_load.idle_connections(address, 2, deadline),
    ):
        pytest.fail("the answer was wrong")


# --- the demo --------------------------------------------------------------------------------------


def test_demo_shows_both_servers_and_leaves_no_process(capsys: pytest.CaptureFixture[str]) -> None:
    children = psutil.Process().children()
    assert _demo.run(MIX, idle=20) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert re.search(r"muxcore +\S +asyncio", out)
    assert re.search(r"connections at once +\S +40 +\S +40", out)
    assert re.search(r"bytes lost +\S +0 +\S +0", out)
    assert "Server CPU per message is" in out
    assert psutil.Process().children() == children


@pytest.mark.parametrize(("name", "code"), [("muxcore", 1), ("asyncio", 0)])
def test_demo_fails_if_muxcore_loses_a_byte(
    name: str, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_demo.SERVERS, name, bad_server(DROPS))
    assert _demo.run(CHATTY, idle=20) == code
    out, err = capsys.readouterr()
    assert re.search(rf"muxcore demo: {name} lost [1-9]", err)
    assert "bytes lost" in out


def test_demo_says_why_a_server_died(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_demo.SERVERS, "muxcore", [sys.executable, "-c", "import sys; sys.exit('boom')"])
    assert _demo.run(CHATTY, idle=20) == 1
    assert capsys.readouterr().err == "muxcore demo: the muxcore server ended with code 1: boom\n"


def test_demo_says_that_a_server_died_under_the_load(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_demo.SERVERS, "muxcore", bad_server("os._exit(7) if at > 1000 else data"))
    assert _demo.run(CHATTY, idle=20) == 1
    assert capsys.readouterr().err == "muxcore demo: the muxcore server ended with code 7\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_stops_its_server(number: signal.Signals) -> None:
    with started(*MUXCORE, "demo") as process:
        assert process.stdout is not None
        assert "idle connections" in process.stdout.readline()  # so the server is there
        servers = psutil.Process(process.pid).children()
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert errors == "muxcore demo: interrupted; both servers are stopped\n"
    assert len(servers) == 1
    assert not servers[0].is_running()


@pytest.mark.parametrize("missing", ["rich", "psutil"])
def test_demo_without_its_extra_says_what_to_install(missing: str) -> None:
    program = f"import sys; sys.modules[{missing!r}] = None; from muxcore._cli import main; sys.exit(main(['demo']))"
    done = run(sys.executable, "-c", program)
    assert done.returncode == 1
    assert done.stderr == f"muxcore demo: it needs {missing}: pip install 'muxcore[demo]'\n"


def test_demo_raises_the_soft_limit_on_open_files() -> None:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < _demo.DESCRIPTORS:
        pytest.skip("the hard limit is too low")
    program = """if True:
        import resource
        from muxcore._cli import _demo
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        _demo._allow_descriptors()
        print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    """
    assert run(sys.executable, "-c", program).stdout == f"{_demo.DESCRIPTORS}\n"


def test_demo_under_a_hard_limit_that_is_too_low() -> None:
    program = """if True:
        import resource, sys
        from muxcore._cli import main
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        sys.exit(main(["demo"]))
    """
    done = run(sys.executable, "-c", program)
    assert done.returncode == 1
    assert re.fullmatch(r"muxcore demo: it needs 2048 open files, and the hard limit is 256.*\n", done.stderr)
