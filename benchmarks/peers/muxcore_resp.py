"""What may live here: a small Redis in muxcore, one reply per request; with `batch` on the command line, one list of
replies per read. What was counted up stays a number, as in Redis, until a client requests it.
"""

from __future__ import annotations

import sys
from typing import Any

from muxcore_callback import ready

import muxcore

Request = list[bytes]
data: dict[bytes, bytes | int] = {}


class Each(muxcore.Handler):
    def on_message(self, conn: muxcore.Connection, request: Request) -> None:
        match request:  # the frequent ones first, without another call
            case [b"GET", key]:
                value = data.get(key)
                conn.send(value if type(value) is not int else b"%d" % value)
            case [b"SET", key, value]:
                data[key] = value
                conn.send("OK")
            case [b"INCR", key]:
                conn.send(incr(key))
            case _:
                conn.send(reply(request))


class Batch(muxcore.Handler):
    def on_messages(self, conn: muxcore.Connection, requests: list[Request]) -> None:
        conn.send_many(map(reply, requests))


def reply(request: Request) -> Any:
    match request:
        case [b"GET", key]:
            value = data.get(key)
            return value if type(value) is not int else b"%d" % value
        case [b"SET", key, value]:
            data[key] = value
            return "OK"
        case [b"INCR", key]:
            return incr(key)
        case [b"PING"]:
            return "PONG"
        case [b"CONFIG", b"GET", name]:
            return [name, b""]
    if request[0].islower():
        return reply([request[0].upper(), *request[1:]])
    return muxcore.RespError(f"ERR unknown command, or a wrong number of arguments: {request[0]!r}")


def incr(key: bytes) -> Any:
    number = data.get(key, 0)
    if type(number) is not int:
        try:
            number = int(number)
        except ValueError:
            return muxcore.RespError("ERR value is not an integer")
    data[key] = number = number + 1
    return number


if __name__ == "__main__":
    handler = Batch() if "batch" in sys.argv else Each()
    muxcore.serve(handler, ("127.0.0.1", 0), framer=muxcore.Resp(), ready=ready)
