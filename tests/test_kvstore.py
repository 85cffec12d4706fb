"""examples/kvstore.py: real clients against SQLite and, where there is one, against PostgreSQL."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import DEADLINE, EXAMPLES, about_examples, example, exchange, receive, until

import muxcore

PROGRAM = EXAMPLES / "kvstore.py"
pytestmark = about_examples


def replies_to(port: int, *requests: str) -> list[str]:
    """Send all requests and a FIN; the replies up to the server's FIN."""
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as sock:
        sock.sendall("".join(request + "\n" for request in requests).encode())
        sock.shutdown(socket.SHUT_WR)
        with sock.makefile() as replies:
            return replies.read().splitlines()


def check_the_protocol(port: int) -> None:
    requests = "GET a", "SET a 1", "SET a one and two", "GET a", "DELETE a", "DELETE a", "GET a", "PING"
    assert replies_to(port, *requests) == [
        "NONE", "OK", "OK", "VALUE one and two", "OK", "NONE", "NONE", "PONG",
    ]  # fmt: skip
    assert replies_to(port, "get a")[0].startswith("ERROR SET key value")


def check_many_clients(port: int) -> None:
    """Each writes and reads its own keys in one go; every request gets its reply, in order, up to the half-close."""
    replies: dict[int, list[str]] = {}

    def client(number: int) -> None:
        lines = [f"{verb} {number}-{i}" + f" {i}" * (verb == "SET") for i in range(50) for verb in ("SET", "GET")]
        replies[number] = replies_to(port, *lines)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert replies == {number: [f for i in range(50) for f in ("OK", f"VALUE {i}")] for number in range(20)}


def test_sqlite_replies_and_keeps_what_it_was_given(tmp_path: Path) -> None:
    database = str(tmp_path / "pairs.db")
    with example("kvstore.py", database) as port:
        check_the_protocol(port)
        check_many_clients(port)
    with example("kvstore.py", database) as port:
        assert replies_to(port, "GET 19-49") == ["VALUE 49"]


def test_netcat_is_a_client(tmp_path: Path, peer_program: Callable[[str], str]) -> None:
    with example("kvstore.py", str(tmp_path / "pairs.db")) as port:
        command = [peer_program("nc"), "-N", "127.0.0.1", str(port)]
        done = subprocess.run(command, input=b"SET a 1\nGET a\n", capture_output=True, timeout=20, check=True)
    assert done.stdout == b"OK\nVALUE 1\n"


def test_a_request_that_the_database_fails_gets_an_error_reply(tmp_path: Path) -> None:
    database = tmp_path / "pairs.db"
    with example("kvstore.py", str(database), complains=True) as port:
        other = sqlite3.connect(database)
        other.execute("DROP TABLE pairs")
        assert replies_to(port, "SET a 1", "PING") == ["ERROR OperationalError", "PONG"]
        other.execute("CREATE TABLE pairs (key BLOB PRIMARY KEY, value BLOB NOT NULL)")
        other.close()
        assert replies_to(port, "SET a 1", "GET a") == ["OK", "VALUE 1"]


def test_a_missing_psycopg_is_named() -> None:
    source = f"import sys, runpy; sys.modules['psycopg'] = None; sys.argv = ['kvstore', 'postgresql:///x'];" \
             f"runpy.run_path({str(PROGRAM)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 1
    assert "postgresql needs psycopg: pip install" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def postgres() -> Iterator[str]:
    """The DSN of a PostgreSQL of our own, on a Unix socket."""
    pytest.importorskip("psycopg", reason="psycopg, or its libpq, is not installed", exc_type=ImportError)
    places = os.pathsep.join([os.environ["PATH"], *map(str, Path("/usr/lib/postgresql").glob("*/bin"))])
    programs = [shutil.which(name, path=places) for name in ("initdb", "postgres")]
    if None in programs:
        if os.environ.get("MUXCORE_REQUIRE_PEERS") == "1":
            pytest.fail("PostgreSQL is not installed, and MUXCORE_REQUIRE_PEERS=1 requires it")
        pytest.skip("PostgreSQL is not installed")
    initdb, server = programs
    user: dict[str, Any] = {"user": "postgres"} if os.geteuid() == 0 else {}  # it refuses to run as root
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        if user:
            shutil.chown(folder, **user)
        data = f"{folder}/data"
        subprocess.run([initdb, "-D", data, "-A", "trust", "-U", "muxcore", "-N"], **user, cwd=folder,
                       check=True, capture_output=True, timeout=50)
        command = [server, "-D", data, "-k", folder, "-c", "listen_addresses=", "-c", "fsync=off"]
        process = subprocess.Popen(command, **user, cwd=folder, stderr=subprocess.PIPE, text=True)
        try:
            assert process.stderr is not None
            assert any("ready to accept connections" in line for line in process.stderr)
            yield f"postgresql://muxcore@/postgres?host={folder}"
        finally:
            process.terminate()
            process.communicate()


def test_postgresql_replies(postgres: str) -> None:
    import psycopg

    with example("kvstore.py", postgres, complains=True) as port:
        check_the_protocol(port)
        check_many_clients(port)
        with psycopg.connect(postgres, autocommit=True) as other:  # the database ends every other session
            other.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
        replies = [replies_to(port, "GET 0-0")[0] for _ in range(20)]
        assert replies.count("VALUE 0") >= 12, "each of the 8 threads notices it once"
        assert all(reply.startswith(("VALUE", "ERROR")) for reply in replies)


def test_an_echo_on_the_same_mux_goes_on_while_the_database_sleeps(tmp_path: Path, backend: str) -> None:
    """A writer holds SQLite's lock: every thread of the pool waits for it, and the echo replies a thousand times."""
    spec = importlib.util.spec_from_file_location("kvstore", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    kvstore = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kvstore)
    database = tmp_path / "pairs.db"
    store = kvstore.sqlite_store(str(database))
    handler = muxcore.Threaded(kvstore.Requests(store), threads=2)
    with muxcore.Mux(backend=backend) as mux:
        pairs = mux.listen(("127.0.0.1", 0), handler, framer=muxcore.Lines())
        echo = mux.listen(("127.0.0.1", 0), lambda conn, message: conn.send(message))
        clients = [socket.create_connection(pairs.address) for _ in range(3)]
        with sqlite3.connect(database, isolation_level=None) as other:
            other.execute("BEGIN IMMEDIATE")
            for sock in clients:
                sock.sendall(b"SET a 1\n")
            until(mux, lambda: mux.stats().messages_in == 3)
            with socket.create_connection(echo.address) as sock:
                for _ in range(1000):
                    assert exchange(mux, sock, b"x" * 100) == b"x" * 100
            assert mux.stats().messages_out == 1000, "no other client got a reply meanwhile"
            other.execute("COMMIT")
        other.close()
        for sock in clients:
            assert receive(mux, sock, 3) == b"OK\n"
            sock.close()
    handler._pool.shutdown()  # each of its threads has a connection to the database
    store.close()
