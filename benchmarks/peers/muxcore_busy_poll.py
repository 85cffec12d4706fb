"""What may live here: the program of muxcore_callback.py on a Mux that spins before it sleeps."""

from __future__ import annotations

import signal

from muxcore_callback import Echo, ready

import muxcore

if __name__ == "__main__":
    with muxcore.Mux(busy_poll=0.01) as mux:
        mux.add_signal_handler(signal.SIGTERM, mux.stop)
        ready(mux, mux.listen(("127.0.0.1", 0), Echo()))
        mux.run()
