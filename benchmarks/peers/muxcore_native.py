"""What may live here: the muxcore server with a handler in C, which Cython compiles when it is first needed.

`--build` does no more than that.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pyximport
from muxcore_callback import ready

import muxcore

if __name__ == "__main__":
    pyximport.install(build_dir=str(Path(__file__).parents[1] / "bin" / "native"), language_level=3)
    module = importlib.import_module("native_echo")
    if "--build" not in sys.argv:
        muxcore.serve(module.Echo(), ("127.0.0.1", 0), ready=ready)
