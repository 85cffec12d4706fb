"""What may live here: that the mutants of tests/mutants are such; whether tests find them is for `make mutants`."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from mutants.mutate import SOURCE, Register, mutate_cython, mutate_python

PYTHON = """
from __future__ import annotations

def clamp(value: int, low: int) -> bool:
    if value < low and low:
        value = low + 1
    print(value)
    return value > 0
"""
CYTHON = """from . cimport something

cdef bint clamp(Thing c, size_t low) except -1:
    if c.value < low and low:
        c.flags |= F_LOW
    touch(<Thing>c, low - 1)
    return c.value > 0
"""


@pytest.fixture
def register() -> Register:
    return Register()


def test_mutants_of_python_are_chosen_while_it_runs(tmp_path: Path, register: Register) -> None:
    text = mutate_python(written(tmp_path, "made.py", PYTHON), register)
    assert [mutant.key.partition(": ")[2] for mutant in register.mutants] == [
        "`value < low` is true", "`value < low` is false", "`value < low` is `value <= low`",
        "`low` is true", "`low` is false", "`low + 1` is without 1", "no `value = low + 1`", "no `print(value)`",
        "`value > 0` is true", "`value > 0` is false", "`value > 0` is `value >= 0`",
    ]
    assert "        if not mutant(7):\n            value = low + (1 - mutant(6))\n" in text


def test_mutants_of_cython_are_chosen_while_it_runs(tmp_path: Path, register: Register) -> None:
    text = mutate_cython(written(tmp_path, "made.pyx", CYTHON), register)
    assert [mutant.key.partition(": ")[2] for mutant in register.mutants] == [
        "`c.value < low` is true", "`c.value < low` is false", "`low` is true", "`low` is false",
        "`c.value < low` is with <=", "no `c.flags |= F_LOW`", "`c.flags |= F_LOW` without F_LOW",
        "no `touch(<Thing>c, low - 1)`", "`low - 1` is without 1",
        "`c.value > 0` is true", "`c.value > 0` is false", "`c.value > 0` is with >=",
    ]
    assert "    if not mutant(8): touch(<Thing>c, low - (1 - mutant(9)))\n" in text


def written(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize("path", sorted(SOURCE.glob("*.py")), ids=lambda path: path.name)
def test_mutants_of_each_module_are_python(path: Path, register: Register) -> None:
    ast.parse(mutate_python(path, register))
    assert len({mutant.key for mutant in register.mutants}) == len(register.mutants)
