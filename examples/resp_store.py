"""A small Redis, in memory, for the clients that Redis has. `resp_store.py [--port PORT]`

    redis-cli -p PORT set greeting hello ex 60
    redis-benchmark -p PORT -t ping,set,get,incr -P 16 -q
    redis.Redis(port=PORT, protocol=2).incr("visits")

With `--cert FILE --key FILE`, a certificate and its private key in PEM, it serves TLS:

    redis-cli -p PORT --tls --cacert FILE get greeting

`muxcore.Resp()` cuts requests out of the stream and writes replies into it; what is left is what each command means. A
key that expires has a timer, so reading one costs no look at a clock. A value that was counted stays an int until a
client reads it, as in Redis.
"""

from __future__ import annotations

import argparse
import os
import ssl
import time
from typing import Any

import muxcore

SECONDS = {b"EX": 1.0, b"PX": 0.001}
INT64 = range(-(1 << 63), 1 << 63)


class Store(muxcore.Handler):
    def __init__(self) -> None:
        self.values: dict[bytes, bytes | int] = {}
        self.timers: dict[bytes, muxcore.TimerHandle] = {}  # of the keys that expire
        self.started = time.time()

    def on_message(self, conn: muxcore.Connection, request: list[bytes]) -> None:
        try:
            conn.send(self.reply(conn, request))
        except ValueError as error:  # the only ones are those of number() and add()
            conn.send(muxcore.RespError(f"ERR {error}"))

    def reply(self, conn: muxcore.Connection, request: list[bytes]) -> Any:
        """bytes, str, int, None and lists become what they are in RESP."""
        match [request[0].upper(), *request[1:]]:
            case [b"GET", key]:
                value = self.values.get(key)
                return b"%d" % value if isinstance(value, int) else value
            case [b"SET", key, value]:
                self.persist(key)
                self.values[key] = value
                return "OK"
            case [b"SET", key, value, unit, amount] if unit.upper() in SECONDS:
                seconds = number(amount) * SECONDS[unit.upper()]
                if seconds <= 0:
                    return muxcore.RespError("ERR invalid expire time in 'set' command")
                self.values[key] = value
                self.expire(conn.mux, key, seconds)
                return "OK"
            case [b"INCR", key]:
                return self.add(key, 1)
            case [b"INCRBY", key, amount]:
                return self.add(key, number(amount))
            case [b"DEL", *keys] if keys:
                return sum(map(self.delete, keys))
            case [b"EXISTS", *keys] if keys:
                return sum(key in self.values for key in keys)
            case [b"EXPIRE", key, amount]:
                return key in self.values and self.expire(conn.mux, key, number(amount))
            case [b"PERSIST", key]:
                return self.persist(key)
            case [b"TTL", key]:
                if key in self.timers:
                    return round(self.timers[key].when - conn.mux.time())
                return -1 if key in self.values else -2
            case [b"DBSIZE"]:
                return len(self.values)
            case [b"PING", *text] if len(text) < 2:
                return text[0] if text else "PONG"
            case [b"ECHO", text]:  # what ends `redis-cli --pipe`
                return text
            case [b"INFO", *_]:
                return self.info(conn.mux)
            case [b"COMMAND", *_]:  # redis-cli requests its hints: there are none
                return []
            case [b"CONFIG", b"GET", name]:  # redis-benchmark sends this
                return [name, b""]
            case [b"CLIENT", *_] | [b"SELECT", b"0"]:  # what client libraries say of themselves
                return "OK"
            case [b"QUIT"]:
                conn.send("OK")
                conn.close()
                return None  # is not sent any more
            case [b"POST" | b"HOST:", *_]:  # HTTP: of a web page, whose text may have commands for us
                conn.close()
                return None
        return muxcore.RespError(f"ERR unknown command, or a wrong number of arguments: {request[0]!r}")

    def add(self, key: bytes, amount: int) -> int:
        value = self.values.get(key, 0)
        result = (value if isinstance(value, int) else number(value)) + amount
        if result not in INT64:
            raise ValueError("increment or decrement would overflow")
        self.values[key] = result
        return result

    def expire(self, mux: muxcore.Mux, key: bytes, seconds: float) -> bool:
        self.persist(key)
        if seconds <= 0:
            return self.delete(key)
        self.timers[key] = mux.call_later(seconds, self.delete, key)
        return True

    def persist(self, key: bytes) -> bool:
        timer = self.timers.pop(key, None)
        if timer is not None:
            timer.cancel()
        return timer is not None

    def delete(self, key: bytes) -> bool:
        self.persist(key)
        return self.values.pop(key, None) is not None

    def info(self, mux: muxcore.Mux) -> bytes:
        lines = (
            "# Server",
            f"process_id:{os.getpid()}",
            f"uptime_in_seconds:{time.time() - self.started:.0f}",
            "# Clients",
            f"connected_clients:{mux.stats().connections}",
            "# Stats",
            f"total_commands_processed:{mux.stats().messages_in}",
            "# Keyspace",
            f"db0:keys={len(self.values)},expires={len(self.timers)}",
        )
        return "".join(line + "\r\n" for line in lines).encode()


def number(text: bytes) -> int:
    if len(text) <= 20 and text.removeprefix(b"-").isdigit() and int(text) in INT64:
        return int(text)
    raise ValueError("value is not an integer or out of range")


def main() -> None:
    parser = argparse.ArgumentParser(description="a small Redis in memory")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--cert", help="a certificate in PEM, for TLS")
    parser.add_argument("--key", help="its private key")
    args = parser.parse_args()
    tls = None
    if args.cert or args.key:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(args.cert, args.key)
    muxcore.serve(
        Store(),
        ("127.0.0.1", args.port),
        framer=muxcore.Resp(),
        tls=tls,
        ready=lambda mux, listener: print("listening", listener.address[1], flush=True),
    )


if __name__ == "__main__":
    main()
