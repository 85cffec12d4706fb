"""What may live here: the entry of `python -m muxcore` and of the muxcore command; the work is in _cli/."""

import sys

from muxcore._cli import main

if __name__ == "__main__":
    sys.exit(main())
