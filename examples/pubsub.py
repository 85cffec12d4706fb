"""Publish and subscribe, to tens of thousands, in the protocol of Redis. `pubsub.py [--port PORT]`

    redis-cli -p PORT subscribe news          redis-cli -p PORT publish news hello

A message is encoded once for all its subscribers. A subscriber that does not read is closed when a megabyte
waits for it, as in Redis.
"""

from __future__ import annotations

import argparse
import resource
from collections import defaultdict
from typing import Any

import muxcore

Channels = dict[bytes, None]  # a dict keeps the order, which a set does not


class Broker(muxcore.Handler):
    def __init__(self) -> None:
        self.subscribers: defaultdict[bytes, dict[muxcore.Connection, None]] = defaultdict(dict)

    def on_open(self, conn: muxcore.Connection) -> None:
        conn.data = Channels()

    def on_message(self, conn: muxcore.Connection, request: list[bytes]) -> None:
        match [request[0].upper(), *request[1:]]:
            case [b"PUBLISH", channel, message]:
                listening = self.subscribers.get(channel, {})
                conn.send(conn.mux.broadcast(listening, [b"message", channel, message]))
            case [b"SUBSCRIBE", *channels] if channels:
                for channel in channels:
                    self.subscribers[channel][conn] = conn.data[channel] = None
                    conn.send([b"subscribe", channel, len(conn.data)])
            case [b"UNSUBSCRIBE", *channels]:
                left: list[Any] = channels or list(conn.data) or [None]
                for channel in left:
                    self.forget(conn, channel)
                    conn.send([b"unsubscribe", channel, len(conn.data)])
            case [b"PING", *text] if len(text) < 2:
                answer: Any = text[0] if text else "PONG"
                conn.send([b"pong", text[0] if text else b""] if conn.data else answer)
            case [b"COMMAND", *_]:
                conn.send([])
            case [b"CLIENT", *_]:
                conn.send("OK")
            case [b"POST" | b"HOST:", *_]:  # HTTP: of a web page, whose text may have commands for us
                conn.close()
            case _:
                conn.send(muxcore.RespError("ERR PUBLISH, SUBSCRIBE, UNSUBSCRIBE or PING"))

    def forget(self, conn: muxcore.Connection, channel: bytes | None) -> None:
        if channel is not None and conn.data.pop(channel, 0) is None:
            del self.subscribers[channel][conn]
            if not self.subscribers[channel]:
                del self.subscribers[channel]

    def on_close(self, conn: muxcore.Connection, exc: BaseException | None) -> None:
        for channel in list(conn.data):
            self.forget(conn, channel)


def main() -> None:
    parser = argparse.ArgumentParser(description="publish and subscribe, in the protocol of Redis")
    parser.add_argument("--port", type=int, default=0)
    port = parser.parse_args().port
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # a descriptor per subscriber; unasked, often only 1,024
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 65536), most))
    muxcore.serve(
        Broker(),
        ("127.0.0.1", port),
        framer=muxcore.Resp(),
        limits=muxcore.Limits(max_outbox=1024 * 1024),
        ready=lambda mux, listener: print("listening", listener.address[1], flush=True),
    )


if __name__ == "__main__":
    main()
