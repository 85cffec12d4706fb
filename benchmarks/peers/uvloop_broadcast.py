"""What may live here: the very program of asyncio_broadcast.py on uvloop's event loop."""

from __future__ import annotations

import uvloop
from asyncio_broadcast import Member
from asyncio_protocol import main

if __name__ == "__main__":
    main(uvloop.new_event_loop, Member)
