"""Remote calls: MessagePack behind a length of four bytes, checked by msgspec. `rpc.py [--port PORT]`

A request is [id, method, arguments], its reply [id, error or nil, result]. The caller chooses the id, so it may have
many calls under way. The annotations of a method say what it accepts: msgspec converts the arguments, or says what is
wrong with them. Python's own multiprocessing.connection puts the same length before its messages:

    with Client(("127.0.0.1", PORT)) as client:
        client.send_bytes(msgspec.msgpack.encode([1, "add", [2, 3]]))
        print(msgspec.msgpack.decode(client.recv_bytes()))  # [1, None, 5]
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from typing import Any

import msgspec

import muxcore


class Request(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    id: int
    method: str
    arguments: list[Any] = []


class Reply(msgspec.Struct, array_like=True):
    id: int | None
    error: str | None
    result: Any = None


class Methods:
    """What can be called: add your own."""

    def add(self, a: int, b: int) -> int:
        return a + b

    def divide(self, a: float, b: float) -> float:
        return a / b

    def reverse(self, text: str) -> str:
        return text[::-1]


class Calls(muxcore.Handler):
    def __init__(self, methods: object) -> None:
        self.methods: dict[str, tuple[Callable[..., Any], Any]] = {}
        for name, method in inspect.getmembers(methods, inspect.ismethod):
            parameters = inspect.signature(method, eval_str=True).parameters.values()
            self.methods[name] = method, tuple[tuple(parameter.annotation for parameter in parameters)]  # type: ignore[misc]
        self.decoder = msgspec.msgpack.Decoder(Request)
        self.encoder = msgspec.msgpack.Encoder()

    def on_message(self, conn: muxcore.Connection, message: bytes) -> None:
        reply = self.reply(message)
        try:
            conn.send(self.encoder.encode(reply))
        except (TypeError, OverflowError) as error:  # a result that MessagePack has no word for
            conn.send(self.encoder.encode(Reply(reply.id, f"{type(error).__name__}: {error}")))

    def reply(self, message: bytes) -> Reply:
        try:
            request = self.decoder.decode(message)
        except msgspec.DecodeError as error:
            return Reply(None, str(error))
        if request.method not in self.methods:
            return Reply(request.id, f"there is no method {request.method!r}")
        method, wanted = self.methods[request.method]
        try:
            return Reply(request.id, None, method(*msgspec.convert(request.arguments, wanted)))
        except Exception as error:  # whatever it is, the caller wants to know
            return Reply(request.id, f"{type(error).__name__}: {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description="remote calls with msgspec")
    parser.add_argument("--port", type=int, default=0)
    muxcore.serve(
        Calls(Methods()),
        ("127.0.0.1", parser.parse_args().port),
        framer=muxcore.LengthPrefix(4),
        ready=lambda mux, listener: print("listening", listener.address[1], flush=True),
    )


if __name__ == "__main__":
    main()
