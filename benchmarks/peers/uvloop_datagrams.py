"""What may live here: the very program of asyncio_datagrams.py on uvloop's event loop."""

from __future__ import annotations

import uvloop
from asyncio_datagrams import main

if __name__ == "__main__":
    main(uvloop.new_event_loop)
