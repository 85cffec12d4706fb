"""The build that checks the core's invariants (`make assert`)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

epoll = pytest.importorskip("muxcore._epoll", reason="there is no compiled core")


def test_the_checks_are_in_the_build_that_sets_muxcore_assert_and_in_no_other() -> None:
    """`make assert` runs all tests with MUXCORE_ASSERT=1; this one fails if they ran on another build."""
    assert (b"this is not so" in Path(epoll.__file__).read_bytes()) == (os.environ.get("MUXCORE_ASSERT") == "1")
