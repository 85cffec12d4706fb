"""What may live here: the program of muxcore_callback.py whose connections have idle and write timeouts."""

from __future__ import annotations

from muxcore_callback import Echo, ready

import muxcore

if __name__ == "__main__":
    timeouts = muxcore.Timeouts(idle=60, write=60)
    muxcore.serve(Echo(), ("127.0.0.1", 0), ready=ready, timeouts=timeouts)
