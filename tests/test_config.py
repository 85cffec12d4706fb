"""Limits and Timeouts are checked when they are made (Promise bad-arguments)."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

import muxcore
from muxcore.errors import without_frames


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"high": -1}, ValueError, "high must be >= 0"),
        ({"low": -1}, ValueError, "low must be >= 0"),
        ({"low": 100, "high": 50}, ValueError, "low must be <= high, not 100 > 50"),
        ({"high": 100, "low": 0, "max_outbox": 50}, ValueError, "high must be <= max_outbox"),
        ({"max_outbox": 0}, ValueError, "max_outbox must be >= 1"),
        ({"max_inbox": 0}, ValueError, "max_inbox must be >= 1"),
        ({"high": 1.5}, TypeError, "high must be an int"),
        ({"high": True}, TypeError, "high must be an int"),
        ({"max_outbox": 1 << 70}, ValueError, "max_outbox must be <="),
        ({"autopause": 0}, TypeError, "autopause must be"),
        ({"autopause": "yes"}, TypeError, "autopause must be"),
        ({"overflow": "explode"}, ValueError, "overflow must be one of"),
    ],
)
def test_bad_limits_are_named(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        muxcore.Limits(**options)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"idle": 0}, ValueError, "idle must be > 0 or None"),
        ({"write": -1}, ValueError, "write"),
        ({"connect": "5"}, TypeError, "connect must be a number"),
        ({"connect": True}, TypeError, "connect must be a number of seconds, not bool"),
        ({"linger": None}, TypeError, "linger must be a number"),
        ({"linger": float("nan")}, ValueError, "linger"),
        ({"linger": float("inf")}, ValueError, "linger"),
    ],
)
def test_bad_timeouts_are_named(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        muxcore.Timeouts(**options)


def test_limits_may_be_equal_and_as_large_as_can_be() -> None:
    largest = 1 << 62
    for size in (1, largest):
        limits = muxcore.Limits(low=size, high=size, max_outbox=size, max_inbox=size)
        assert (limits.low, limits.high, limits.max_outbox, limits.max_inbox) == (size,) * 4


@pytest.mark.parametrize("settings", [muxcore.Limits(), muxcore.Timeouts()])
def test_settings_are_frozen(settings: Any) -> None:
    before = repr(settings)
    for field in settings.__slots__:
        with pytest.raises(AttributeError, match=f"cannot set '{field}'"):
            setattr(settings, field, 1)
        with pytest.raises(AttributeError, match=f"cannot delete '{field}'"):
            delattr(settings, field)
    assert repr(settings) == before


@pytest.mark.parametrize("settings", [muxcore.Limits(low=1, overflow="drop"), muxcore.Timeouts(idle=2.5)])
def test_settings_are_values(settings: Any) -> None:
    same = eval(repr(settings), vars(muxcore))
    assert (same, hash(same)) == (settings, hash(settings))
    assert settings != type(settings)()
    assert settings != 1
    assert pickle.loads(pickle.dumps(settings)) == copy.copy(settings) == settings


def test_a_changed_copy_is_checked_like_a_new_one() -> None:
    settings = muxcore.Limits(low=5)
    assert settings.__replace__(high=10) == muxcore.Limits(low=5, high=10)
    with pytest.raises(ValueError, match="low must be <= high"):
        settings.__replace__(high=4)
    with pytest.raises(TypeError, match="hihg"):
        settings.__replace__(hihg=4)


# --- errors that are kept --------------------------------------------------------------------------


def raised(error: BaseException) -> BaseException:
    """With a traceback."""
    try:
        raise error
    except BaseException as same:
        return same


def test_errors_that_lead_to_each_other_lose_their_frames() -> None:
    first, second = raised(ValueError("first")), raised(KeyError("second"))
    first.__context__, second.__context__ = second, first
    assert without_frames(first) is first
    assert (first.__traceback__, second.__traceback__) == (None, None)


def test_the_errors_of_a_group_lose_their_frames() -> None:
    member = raised(ValueError("member"))
    group = raised(BaseExceptionGroup("group", [member]))
    without_frames(group)
    assert (group.__traceback__, member.__traceback__) == (None, None)
