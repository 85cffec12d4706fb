"""What may live here: an echo server in muxcore's pull style, and nothing else."""

from __future__ import annotations

import signal
import sys
from typing import Any, NoReturn

import muxcore


def stop(*_: object) -> NoReturn:
    sys.exit(0)


def main(framer: Any = None) -> None:
    signal.signal(signal.SIGTERM, stop)
    with muxcore.Mux() as mux:
        listener = mux.listen(("127.0.0.1", 0), framer=framer)
        print("listening", listener.address[1], flush=True)
        while True:
            for conn, _ in mux.poll():
                for message in conn:
                    conn.send(message)


if __name__ == "__main__":
    main()
