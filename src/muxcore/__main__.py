"""python -m muxcore: see muxcore/_cli/."""

from muxcore._cli import main

if __name__ == "__main__":
    raise SystemExit(main())
