"""The standard library's own tests, with muxcore's objects in the place of the originals (Promise drop-in)."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import textwrap

import pytest

from muxcore._impl import BACKENDS

# Tests that cannot apply, and why. Everything else in those suites has to pass.
NOT_APPLICABLE = {
    "test_modify_unregister": "it patches a private class of selectors by name",
}

EPOLL = """
    import select, muxcore
    select.epoll = muxcore.Epoll
    import test.test_epoll as suite
"""
SELECTORS = """
    import unittest, muxcore
    import test.test_selectors as suite
    class Ours(muxcore.Selector):
        def __init__(self): super().__init__(backend=BACKEND)
    class OurTest(suite.BaseSelectorTestCase, *([suite.ScalableSelectorMixIn] if SCALES else []), unittest.TestCase):
        SELECTOR = Ours
    for name in list(vars(suite)):
        if isinstance(getattr(suite, name), type) and issubclass(getattr(suite, name), unittest.TestCase):
            delattr(suite, name)
    suite.OurTest = OurTest
"""
USERS = """
    import functools, selectors, socketserver, subprocess, muxcore
    from muxcore._impl import BACKENDS
    selectors.DefaultSelector = socketserver._ServerSelector = muxcore.Selector
    for backend in ("epoll", "poll", "select", "kqueue"):
        vars(selectors).pop(f"{backend.capitalize()}Selector", None)
        if backend in BACKENDS:
            ours = functools.partial(muxcore.Selector, backend=backend)
            setattr(selectors, f"{backend.capitalize()}Selector", ours)
    # Its own choice is poll, too: a child's stdin may be a regular file, which epoll refuses.
    subprocess._PopenSelector = lambda: muxcore.Selector(backend="poll")
    import MODULE as suite
"""
RUN = """
    import sys, unittest
    tests = unittest.defaultTestLoader.loadTestsFromModule(suite)
    def flat(tests):
        for test in tests:
            if isinstance(test, unittest.TestSuite): yield from flat(test)
            elif test.id().rpartition(".")[2] not in NOT_APPLICABLE: yield test
    result = unittest.TextTestRunner(stream=sys.stderr, verbosity=1).run(unittest.TestSuite(flat(tests)))
    sys.exit(not result.wasSuccessful())
"""


def run(setup: str, at_least: int, timeout: float = 55, **environment: str) -> None:
    """Run a suite in a process of its own; it must pass, and not by being empty."""
    source = textwrap.dedent(setup) + textwrap.dedent(RUN).replace("NOT_APPLICABLE", repr(set(NOT_APPLICABLE)))
    env = {**os.environ, **environment}
    command = [sys.executable, "-c", source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    count = re.search(r"^Ran (\d+) tests?", done.stderr, re.MULTILINE)
    assert count is not None
    assert int(count[1]) >= at_least


def needs(module: str) -> None:
    if importlib.util.find_spec("test") is None or importlib.util.find_spec(module) is None:
        pytest.skip(f"this Python does not carry {module}")


@pytest.mark.linux_only("epoll")
@pytest.mark.parametrize("core", ["", "fallback"])
def test_epoll_passes_the_tests_of_select_epoll(core: str) -> None:
    needs("test.test_epoll")
    run(EPOLL, at_least=10, **({"MUXCORE_NO_EXTENSIONS": "1"} if core == "fallback" else {}))


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_selector_passes_the_tests_of_selectors(backend: str) -> None:
    needs("test.test_selectors")
    setup = SELECTORS.replace("BACKEND", repr(backend)).replace("SCALES", str(backend != "select"))
    run(setup, at_least=15)


@pytest.mark.parametrize(
    ("module", "at_least"),
    [
        ("test.test_socketserver", 15),
        ("test.test_asyncio.test_sock_lowlevel", 15),
        ("test.test_asyncio.test_streams", 40),
        ("test.test_asyncio.test_events", 100),
        ("test.test_asyncio.test_sendfile", 20),
        ("test.test_asyncio.test_server", 3),
        ("test.test_asyncio.test_buffered_proto", 1),
    ],
)
def test_users_of_selectors_work_with_ours(module: str, at_least: int) -> None:
    needs(module)
    run(USERS.replace("MODULE", module), at_least)


# What does not wait, or not with a selector, is left to the class that it inherits from.
NO_POLL = """
    for name in dir(suite.ProcessTestCaseNoPoll):
        if name.startswith("test_") and "communicate" not in name:
            setattr(suite.ProcessTestCaseNoPoll, name, None)
"""


@pytest.mark.unix_only("subprocess uses threads on Windows")
@pytest.mark.timeout(200)
def test_subprocess_works_with_our_selector() -> None:
    needs("test.test_subprocess")
    setup = USERS.replace("MODULE", "test.test_subprocess") + NO_POLL
    run(setup, at_least=100, timeout=190)
