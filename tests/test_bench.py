"""`python -m muxcore bench`, with tiny counts: no figure of it means anything here."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from test_cli import MUXCORE, run

from muxcore._cli import _bench, _demo, _demo_load, main
from muxcore._cli._bench import WORKS, Work

pytestmark = pytest.mark.unix_only("its servers end by a signal")

TINY = [replace(work, blocks=3) for work in WORKS]
HERE = [name for name in ("asyncio", "uvloop", "redis-server") if find_spec(name) or shutil.which(name)]


@pytest.fixture
def _on_backend(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUXCORE_BACKEND", backend)


@pytest.mark.usefixtures("_on_backend")
@pytest.mark.parametrize("work", TINY, ids=lambda work: work.name)
def test_bench_measures_muxcore_on_each_core(work: Work) -> None:
    measured = _bench.measure(work, "muxcore", [])
    assert measured.messages == _bench.CLIENTS * 3 * work.messages
    assert measured.seconds > 0
    assert 0 < measured.p50_ms <= measured.p99_ms


@pytest.mark.parametrize("name", ["muxcore", *HERE])
def test_the_servers_of_the_bench_listen_on_loopback(name: str) -> None:
    """docs/threat-model.md"""
    work = next(work for work in TINY if name in work.servers)
    deadline = time.monotonic() + 30
    with _demo._server(name, _bench.command(work, name), deadline) as (process, address):
        _bench._wait(address, deadline)
        listening = {conn.laddr.ip for conn in process.net_connections() if conn.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}


def test_bench_shows_all_that_is_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    children = psutil.Process().children()
    affinity = psutil.Process().cpu_affinity() if sys.platform == "linux" else None
    assert _bench.run(1, TINY, tmp_path / "found.json") == 0
    out, err = capsys.readouterr()
    found = json.loads((tmp_path / "found.json").read_text())
    expected = [(work.name, name) for work in TINY for name in work.servers if name in ("muxcore", *HERE)]
    seen = [(result["work"], result["server"]) for result in found["results"]]
    assert sorted(seen) == sorted(expected)
    assert found["environment"]["python"] in out
    for work in TINY:
        assert work.title in out
    assert out.count("muxcore ") >= len(TINY)
    assert set(re.findall(r"uvloop|redis-server", err)) == {"uvloop", "redis-server"} - set(HERE)
    assert psutil.Process().children() == children
    assert affinity is None or psutil.Process().cpu_affinity() == affinity


def test_bench_interleaves_its_rounds() -> None:
    work = replace(TINY[0], servers=("muxcore", "asyncio"))
    assert [name for _, name in _bench._runs(2, [work])] == ["muxcore", "asyncio", "asyncio", "muxcore"]


def test_bench_names_what_is_not_installed(capsys: pytest.CaptureFixture[str]) -> None:
    work = replace(TINY[0], servers=("muxcore", "no_such_peer"))
    assert [name for _, name in _bench._runs(1, [work])] == ["muxcore"]
    assert capsys.readouterr().err == "left out, not installed: no_such_peer\n"


def test_bench_fails_if_a_server_sends_something_else(capsys: pytest.CaptureFixture[str]) -> None:
    work = replace(TINY[0], reply=TINY[0].request[::-1])
    assert _bench.run(1, [work]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("muxcore bench: muxcore, echo, 256 bytes: it sent something else than the right reply\n")


def test_bench_fails_if_a_server_sends_too_much() -> None:
    """A byte beyond the reply, which nothing would follow."""
    work = replace(TINY[0], blocks=1, reply=TINY[0].request[:-1])
    with _demo._server("muxcore", _demo.SERVERS["muxcore"], time.monotonic() + 30) as (_, address):
        load = _demo_load.run_load(address, work, time.monotonic() + 30, lambda _: None)
    assert load.failures == {"it sent something else than the right reply": _bench.CLIENTS}


def test_bench_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    files: list[Path | None] = []
    monkeypatch.setattr(_bench, "run", lambda file: files.append(file) or 0)
    assert main(["bench"]) == main(["bench", "--json", "x.json"]) == 0
    assert files == [None, Path("x.json")]


def test_bench_without_its_extra_says_what_to_install() -> None:
    program = "import sys; sys.modules['psutil'] = None; from muxcore._cli import main; sys.exit(main(['bench']))"
    done = run(sys.executable, "-c", program)
    assert (done.returncode, done.stderr) == (1, "muxcore bench: it needs psutil: pip install 'muxcore[demo]'\n")


def test_bench_help() -> None:
    assert "--json FILE" in run(*MUXCORE, "bench", "--help").stdout
