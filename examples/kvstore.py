"""A key-value server over a database, which may be slow. `kvstore.py [--port PORT] FILE-OR-DSN`

    SET key value  ->  OK
    GET key        ->  VALUE value, or NONE
    DELETE key     ->  OK, or NONE
    PING           ->  PONG

A file is an SQLite database; for a DSN (postgresql://...), psycopg has to be installed. One thread
serves all clients; it hands their requests to the threads of `muxcore.Threaded`, each of which has a connection to the
database. A request that the database fails gets ERROR as its reply, and the next one a new connection.
"""

from __future__ import annotations

import argparse
import logging
import sqlite3
import sys
import threading
from collections.abc import Callable
from typing import Any

import muxcore

log = logging.getLogger("kvstore")


class Store:
    """A table of keys and values, and for each thread a connection of its own."""

    def __init__(self, connect: Callable[[], Any], placeholder: str, binary: str) -> None:
        self.connect = connect
        self.mine = threading.local()
        self.connections: set[Any] = set()
        self.put = (
            f"INSERT INTO pairs VALUES ({placeholder}, {placeholder}) "
            "ON CONFLICT (key) DO UPDATE SET value = excluded.value"
        )
        self.get = f"SELECT value FROM pairs WHERE key = {placeholder}"
        self.delete = f"DELETE FROM pairs WHERE key = {placeholder}"
        self.execute(f"CREATE TABLE IF NOT EXISTS pairs (key {binary} PRIMARY KEY, value {binary} NOT NULL)")

    def execute(self, query: str, *values: bytes) -> Any:
        """The cursor of a query, which is committed at once."""
        if not hasattr(self.mine, "connection"):
            self.mine.connection = self.connect()
            self.connections.add(self.mine.connection)
        try:
            return self.mine.connection.execute(query, values)
        except Exception:
            self.mine.connection.close()  # it may be broken: the next request gets a new one
            self.connections.remove(self.mine.connection)
            del self.mine.connection
            raise

    def close(self) -> None:
        for connection in self.connections:
            connection.close()


def sqlite_store(path: str) -> Store:
    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = WAL")  # readers do not wait for the writer
        return connection

    return Store(connect, "?", "BLOB")


def postgres_store(dsn: str) -> Store:
    try:
        import psycopg
    except ImportError as error:
        sys.exit(f"kvstore: {dsn.partition(':')[0]} needs psycopg: pip install 'psycopg[binary]' ({error})")
    return Store(lambda: psycopg.connect(dsn, autocommit=True), "%s", "BYTEA")


class Requests(muxcore.Handler):
    """Replies in a thread of the pool."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def on_message(self, conn: muxcore.Connection, line: bytes) -> None:
        try:
            conn.send(self.answer(line))
        except Exception as error:
            log.exception("%r failed", line)
            conn.send(f"ERROR {type(error).__name__}".encode())

    def answer(self, line: bytes) -> bytes:
        match line.split(b" ", 2):
            case [b"GET", key]:
                row = self.store.execute(self.store.get, key).fetchone()
                return b"NONE" if row is None else b"VALUE " + row[0]
            case [b"SET", key, value]:
                self.store.execute(self.store.put, key, value)
                return b"OK"
            case [b"DELETE", key]:
                return b"OK" if self.store.execute(self.store.delete, key).rowcount else b"NONE"
            case [b"PING"]:
                return b"PONG"
        return b"ERROR SET key value, GET key, DELETE key or PING"


def main() -> None:
    parser = argparse.ArgumentParser(description="a key-value server over SQLite or PostgreSQL")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("database", help="a file, or postgresql://...")
    options = parser.parse_args()
    is_dsn = options.database.startswith(("postgresql://", "postgres://"))
    store = (postgres_store if is_dsn else sqlite_store)(options.database)
    muxcore.serve(
        muxcore.Threaded(Requests(store)),
        ("127.0.0.1", options.port),
        framer=muxcore.Lines(),
        ready=lambda mux, listener: print("listening", listener.address[1], flush=True),
    )
    store.close()


if __name__ == "__main__":
    main()
