"""What may live here: the program of asyncio_protocol.py, or one of asyncio_framing.py that the command line names, on
aiofastnet's transports over uvloop's event loop."""

from __future__ import annotations

import sys

import aiofastnet
import asyncio_framing
import uvloop
from asyncio_protocol import Echo, main

if __name__ == "__main__":
    main(aiofastnet.loop_factory(uvloop.new_event_loop), asyncio_framing.chosen() if sys.argv[1:] else Echo)
