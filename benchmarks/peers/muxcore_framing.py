"""What may live here: muxcore servers that echo messages: `lines|length each|batch|pull` on the command line."""

from __future__ import annotations

import sys

import muxcore_pull
from muxcore_callback import Echo, ready

import muxcore

FRAMERS = {"lines": muxcore.Lines(), "length": muxcore.LengthPrefix(4)}


class EchoBatch(muxcore.Handler):
    def on_messages(self, conn: muxcore.Connection, messages: list[bytes]) -> None:
        conn.send_many(messages)


HANDLERS = {"each": Echo, "batch": EchoBatch}


def main(frame: str, style: str) -> None:
    if style == "pull":
        muxcore_pull.main(FRAMERS[frame])
    else:
        muxcore.serve(HANDLERS[style](), ("127.0.0.1", 0), framer=FRAMERS[frame], ready=ready)


if __name__ == "__main__":
    main(*sys.argv[1:])
