"""docs/promises.md and the tests: each promise is cited by a test, and each citation is of a promise."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "promises.md"
NAME = r"[a-z]+(?:-[a-z]+)*"
SOURCES = {".py", ".pyi", ".pyx", ".pxd", ".pxi"}


def promises() -> list[str]:
    return re.findall(rf"^### ({NAME})$", PAGE.read_text(), re.MULTILINE)


def citations() -> dict[str, set[str]]:
    """By name: the files that cite it, as "Promise timers" or "Promises timers, fork"."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "tests").rglob("*.py"):
        if path == Path(__file__):
            continue
        text = re.sub(r"\s+", " ", path.read_text())
        for names in re.findall(rf"\bPromises? ({NAME}(?:, {NAME})*)", text):
            for name in names.split(", "):
                found.setdefault(name, set()).add(path.name)
    return found


def test_each_promise_has_a_name_of_its_own() -> None:
    assert len(promises()) == len(set(promises())) > 30


def test_each_promise_is_cited_by_a_test() -> None:
    assert set(promises()) - citations().keys() == set()


def test_each_citation_is_of_a_promise() -> None:
    assert citations().keys() - set(promises()) == set()


def test_no_file_cites_a_promise_by_a_number() -> None:
    files = [path for folder in ("src", "tests") for path in (ROOT / folder).rglob("*") if path.suffix in SOURCES]
    assert len(files) > 50
    assert [path.name for path in files if re.search(r"\b4\.\d+:", path.read_text())] == []
