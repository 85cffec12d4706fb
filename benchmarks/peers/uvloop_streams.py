"""What may live here: the very programs of asyncio_streams.py on uvloop's event loop."""

from __future__ import annotations

import uvloop
from asyncio_streams import main

if __name__ == "__main__":
    uvloop.run(main())
