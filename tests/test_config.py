"""Limits and Timeouts are checked when they are made (DESIGN 4.18)."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import muxcore


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
        ({"linger": None}, TypeError, "linger must be a number"),
        ({"linger": float("nan")}, ValueError, "linger"),
        ({"linger": float("inf")}, ValueError, "linger"),
    ],
)
def test_bad_timeouts_are_named(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        muxcore.Timeouts(**options)


@pytest.mark.parametrize("settings", [muxcore.Limits(), muxcore.Timeouts()])
def test_settings_are_frozen(settings: Any) -> None:
    field = dataclasses.fields(settings)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(settings, field, 1)
