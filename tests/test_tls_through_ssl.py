"""TLS on the compiled core where it does not call OpenSSL itself: all of test_tls.py, through Python's ssl."""

from __future__ import annotations

import pytest
from test_tls import *  # noqa: F403
from test_tls import Keys


@pytest.fixture(scope="module")
def keys() -> Keys:
    return Keys(through_ssl=True)


@pytest.fixture
def backend() -> str:
    return "epoll"
