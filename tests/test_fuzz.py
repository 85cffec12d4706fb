"""The fuzzers of tests/fuzz, for some seconds; and their inputs on both cores."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from fuzz.run import CORPUS, LIMITS, NEEDED, build
from fuzz.server import EPISODES, generated, play
from streams import from_fuzzer
from test_cores import received

from muxcore._impl import BACKENDS

both_cores = pytest.mark.skipif("epoll" not in BACKENDS, reason="the compiled core is missing")
SEEDS = sorted(path for path in CORPUS.glob("*/*"))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("clang") is None:
        if os.environ.get("MUXCORE_REQUIRE_PEERS") == "1":
            pytest.fail(NEEDED)
        pytest.skip(NEEDED)
    return build(tmp_path_factory.mktemp("fuzz"))


def fuzz(target: Path, *arguments: object) -> None:
    command = [target, *LIMITS, f"-artifact_prefix={target.parent}/", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=50)
    assert done.returncode == 0, done.stdout[-4000:].decode(errors="replace")


@pytest.mark.linux_only("the clang of other systems may come without libFuzzer")
def test_nothing_is_wrong_with_known_inputs(target: Path) -> None:
    fuzz(target, "-runs=0", CORPUS)


@pytest.mark.linux_only("the clang of other systems may come without libFuzzer")
@both_cores
def test_nothing_is_found_and_both_cores_read_what_is_the_same(target: Path, tmp_path: Path) -> None:
    fuzz(target, "-max_total_time=8", tmp_path, CORPUS)
    found = [path.read_bytes() for path in tmp_path.iterdir()]
    assert len(found) > 100, "it is guided by coverage"
    for data in found:
        check_both_cores(data)


@both_cores
@pytest.mark.parametrize("path", SEEDS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_both_cores_read_known_inputs_the_same(path: Path) -> None:
    check_both_cores(path.read_bytes())


def check_both_cores(data: bytes) -> None:
    framer, pieces = from_fuzzer(data)
    assert received("epoll", framer, "pull", pieces) == received("select", framer, "pull", pieces), data


# --- the whole server ------------------------------------------------------------------------------


@pytest.mark.linux_only("it reads from the kernel what is on its way")
@pytest.mark.parametrize("path", sorted(EPISODES.glob("*.json")), ids=lambda path: path.stem)
def test_known_episodes_are_as_the_model_says(backend: str, path: Path) -> None:
    play(backend, [tuple(step) for step in json.loads(path.read_text())])


@pytest.mark.linux_only("it reads from the kernel what is on its way")
def test_random_episodes_are_as_the_model_says(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "muxcore")
    for seed in range(100):
        play(backend, generated(seed))
