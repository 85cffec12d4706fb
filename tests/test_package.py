"""What is installed: how large it is, and what importing it costs."""

from __future__ import annotations

import email
import io
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import muxcore
from muxcore._impl import core

# The import of each costs milliseconds; together, five times as long as all of muxcore.
HEAVY = ("asyncio", "concurrent.futures", "contextlib", "dataclasses", "enum", "inspect", "logging", "pathlib", "re",
         "signal", "socket", "threading", "typing")
WHEEL_LIMIT = 1 << 20  # bytes


def imported(program: str, *, after: str = "pass") -> set[str]:
    """What a program has imported, beside what Python itself, and another program, had before."""
    source = f"import sys; {after}; before = set(sys.modules); {program}; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=30, check=True)
    return set(done.stdout.split())


def test_importing_muxcore_imports_nothing_heavy() -> None:
    assert imported("import muxcore").isdisjoint(HEAVY)


SERVER = """
from socket import SO_TYPE, SOL_SOCKET
import muxcore

class Handler:
    def on_message(self, conn, message): conn.sned(message)  # this is logged, with what may have been meant
    def on_close(self, conn, exc): closed.append(exc)
    def on_datagrams(self, datagram, messages): received.extend(messages)

closed, received = [], []
mux = muxcore.Mux()
listener = mux.listen(("127.0.0.1", 0), Handler())
"""
STARVED = """
import os, resource, socket
client = socket.create_connection(listener.address)
while not mux.stats().accepts:
    mux.poll(1)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
clients = [socket.create_connection(listener.address) for _ in range(20)]
client.send(b"this is a mistake to get")
spare = []
try:
    while True:
        spare.append(os.dup(0))
except OSError:
    pass
for _ in range(5):
    mux.poll(0.01)
for fd in spare:
    os.close(fd)
while mux.stats().accepts < 21:
    mux.poll(1)
"""
USE = """
mux.run_in_executor(None, int).result()
conn = mux.connect(listener.address, Handler())
datagram = mux.datagram(("127.0.0.1", 0), Handler())
datagram.send(b"data", datagram.address)
while len(mux.connections) < 2 or not received:
    mux.poll(1)
[(conn.peer, conn.local, conn.getsockopt(SOL_SOCKET, SO_TYPE)) for conn in mux.connections]
mux.attach(conn.detach(), Handler()).send(b"this is a mistake to get")
while len(closed) < 3:
    mux.poll(1)
mux.close()
"""


def test_a_server_that_listens_has_imported_all_that_it_will_need() -> None:
    """For then there may be no descriptor left to read it with. (Modules built into the interpreter need none.)"""
    used = imported(f"exec({USE!r})", after=f"exec({SERVER!r})")
    assert used.difference(sys.builtin_module_names) == set()


def test_a_server_without_a_descriptor_left_logs_that_and_goes_on(backend: str) -> None:
    """Promise handler-raises; in a process of its own, where no other test has imported what this needs."""
    pytest.importorskip("resource")
    environment = os.environ | {"MUXCORE_BACKEND": backend}
    command = [sys.executable, "-c", SERVER + STARVED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "accept failed, pausing: Too many open files" in done.stderr
    assert "has no attribute 'sned'" in done.stderr
    assert "Logging error" not in done.stderr


@pytest.mark.skipif(core != "compiled", reason="it is the core that runs")
def test_the_fallback_is_imported_only_when_it_is_used() -> None:
    assert "muxcore._fallback.mux" not in imported("import muxcore; muxcore.Mux().close()")
    assert "muxcore._fallback.mux" in imported("import muxcore; muxcore.Mux(backend='select').close()")


def test_a_wheel_is_smaller_than_a_mebibyte() -> None:
    folder = Path(muxcore.__file__).parent
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    files = [*folder.rglob("*.py"), *folder.glob("*.pyi"), *folder.glob(f"*{suffix}")]
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            archive.write(file)
    assert len(files) > 20
    assert wheel.tell() < WHEEL_LIMIT


@pytest.mark.parametrize("repository", ["", "someone/muxcore"])
def test_links_in_the_metadata_lead_to_the_repository_of_the_build(repository: str, tmp_path: Path) -> None:
    """An index's page has no files beside the README."""
    pytest.importorskip("setuptools", reason="the metadata is made by setuptools")
    root = Path(__file__).parents[1]
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path)
    shutil.copytree(root / "src", tmp_path / "src", ignore=shutil.ignore_patterns("*.so", "*.egg-info"))
    env = {**os.environ, "MUXCORE_NO_EXTENSIONS": "1", "GITHUB_REPOSITORY": repository, "GITHUB_REF_NAME": "v1.0"}
    env.pop("GITHUB_SERVER_URL", None)
    build = "from setuptools.build_meta import prepare_metadata_for_build_wheel as prepare; prepare('.')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, env=env, check=True, capture_output=True)
    (file,) = tmp_path.glob("*.dist-info/METADATA")
    metadata = email.message_from_string(file.read_text(encoding="utf-8"))
    urls = dict(line.split(", ", 1) for line in metadata.get_all("Project-URL", []))
    links = re.findall(r"\]\(([^)]+)\)", metadata.get_payload())
    relative = [link for link in links if "://" not in link]
    assert len(links) > 20
    if not repository:
        assert (urls, relative) == ({}, links)
        return
    assert urls["Source"] == "https://github.com/someone/muxcore"
    assert relative == []
    for link in [*links, *urls.values()]:
        path = re.sub(r"^https://github.com/someone/muxcore/(blob|raw)/v1.0/|#.*", "", link)
        assert path.startswith("https://") or (root / path).exists(), link
        assert link.endswith(".svg") == ("/raw/" in link)
