"""A chat of lines: each line goes to all other members. `chat.py [--port PORT]`, then `nc 127.0.0.1 PORT`.

The first line is your name. Members do not wait for a slow reader, which costs no more memory than `Limits.high`:
one that is that far behind misses lines, and is sent their number when it has caught up.
"""

from __future__ import annotations

import argparse
import socket
from dataclasses import dataclass

import muxcore


@dataclass(slots=True)
class Member:
    name: bytes
    behind: bool = False
    missed: int = 0


class Chat(muxcore.Handler):
    def __init__(self) -> None:
        self.members: dict[muxcore.Connection, Member] = {}

    def on_open(self, conn: muxcore.Connection) -> None:
        # Else the kernel, too, would keep megabytes for a slow reader, which would then get very old lines.
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        conn.send(b"* what is your name?")

    def on_message(self, conn: muxcore.Connection, line: bytes) -> None:
        if conn in self.members:
            self.say(b"%b: %b" % (self.members[conn].name, line[:1000]), conn)
        else:
            self.members[conn] = Member(line[:20].strip() or b"somebody")
            self.say(b"* %b is here" % self.members[conn].name)

    def on_close(self, conn: muxcore.Connection, exc: BaseException | None) -> None:
        if conn in self.members:
            self.say(b"* %b has left" % self.members.pop(conn).name)

    def say(self, line: bytes, speaker: muxcore.Connection | None = None) -> None:
        for conn, member in self.members.items():
            if member.behind:
                member.missed += 1
            elif conn is not speaker:
                member.behind = not conn.send(line)  # False: accepted, but above the high-water mark

    def on_drain(self, conn: muxcore.Connection) -> None:
        member = self.members.get(conn)
        if member is not None and member.missed:
            conn.send(b"* you were too slow for %d lines" % member.missed)
        if member is not None:
            member.behind, member.missed = False, 0


def main() -> None:
    parser = argparse.ArgumentParser(description="a chat of lines")
    parser.add_argument("--port", type=int, default=0)
    muxcore.serve(
        Chat(),
        ("127.0.0.1", parser.parse_args().port),
        framer=muxcore.Lines(max_size=1100),
        ready=lambda mux, listener: print("listening", listener.address[1], flush=True),
    )


if __name__ == "__main__":
    main()
