"""What may live here: a small Redis in muxcore, one reply per request; with `batch` on the command line, one list of
replies per read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from muxcore_callback import ready

import muxcore

Request = list[bytes]
data: dict[bytes, bytes] = {}


def get(request: Request) -> bytes | None:
    _, key = request
    return data.get(key)


def set_(request: Request) -> str:
    _, key, value = request
    data[key] = value
    return "OK"


def incr(request: Request) -> int:
    _, key = request
    value = int(data.get(key, 0)) + 1
    data[key] = b"%d" % value
    return value


FUNCTIONS = {"GET": get, "SET": set_, "INCR": incr, "PING": lambda _: "PONG", "CONFIG": lambda r: [r[-1], b""]}
COMMANDS: dict[bytes, Callable[[Request], Any]] = {
    spelling.encode(): fn for name, fn in FUNCTIONS.items() for spelling in (name, name.lower())
}


def reply(request: Request) -> Any:
    try:
        return COMMANDS[request[0]](request)
    except KeyError:
        return muxcore.RespError(f"ERR unknown command '{request[0].decode(errors='replace')}'")
    except ValueError as error:
        return muxcore.RespError(f"ERR {error}")


class Each(muxcore.Handler):
    def on_message(self, conn: muxcore.Connection, request: Request) -> None:
        conn.send(reply(request))


class Batch(muxcore.Handler):
    def on_messages(self, conn: muxcore.Connection, requests: list[Request]) -> None:
        conn.send_many(map(reply, requests))


if __name__ == "__main__":
    handler = Batch() if "batch" in sys.argv else Each()
    muxcore.serve(handler, ("127.0.0.1", 0), framer=muxcore.Resp(), ready=ready)
