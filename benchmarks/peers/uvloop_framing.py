"""What may live here: the very programs of asyncio_framing.py on uvloop's event loop."""

from __future__ import annotations

import uvloop
from asyncio_framing import chosen
from asyncio_protocol import main

if __name__ == "__main__":
    main(uvloop.new_event_loop, chosen())
