"""The demo, and its load, which must see what a bad server does."""

from __future__ import annotations

import re
import signal
import socket
import sys
import time

import psutil
import pytest
from test_cli import MUXCORE, run, started

from muxcore._cli import _demo, _demo_load

pytestmark = pytest.mark.unix_only("the demo needs poll and signals")

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


def load_on(command: list[str], mix: _demo_load.Mix, seconds: float = 30) -> _demo_load.Result:
    deadline = time.monotonic() + seconds
    with _demo._server("tested", command, deadline) as (_, address):
        return _demo_load.run_load(address, mix, deadline, lambda _: None)


@pytest.mark.parametrize("name", ["muxcore", "asyncio"])
def test_the_servers_of_the_demo_listen_on_loopback(name: str) -> None:
    """docs/threat-model.md"""
    with _demo._server(name, _demo.SERVERS[name], time.monotonic() + 30) as (_, address):
        assert address[0] == "127.0.0.1"


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
    assert result.late > 0
    assert result.lost == 0, "unfinished is not lost"
    assert result.messages == result.verified == 0


def test_the_load_on_a_port_without_a_listener() -> None:
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
        pytest.fail("the reply was wrong")


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
def test_an_interrupted_demo_stops_its_server(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONDEVMODE", raising=False)  # an interrupt may come before a new socket is anybody's
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
    import resource

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
