"""Builds the fuzz target and runs it: python tests/fuzz/run.py SECONDS. What it finds is kept in build/fuzz."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CORPUS = HERE / "corpus"
NEEDED = "the fuzzer needs clang and its runtime (Debian: apt install clang libclang-rt-dev)"

# Line directives: findings name lines of _core/frame.pxd. The other directives are setup.py's, where they matter to it.
CYTHON = ["-3", "--line-directives", "-X", "cdivision=True", "-X", "boundscheck=False", "-I", ROOT / "src"]
CLANG = ["-O1", "-g", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all"]
CLANG += ["-Werror", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-missing-field-initializers"]
LIMITS = ["-max_len=256", "-timeout=10", f"-dict={HERE / 'tokens.dict'}"]


def build(folder: Path, *flags: str) -> Path:
    """The program, made anew. Python is linked to the extension's unused half, and never started."""
    source, program = folder / "frames.c", folder / "frames"
    subprocess.run([sys.executable, "-m", "cython", *CYTHON, "-o", source, HERE / "frames.pyx"], check=True)
    config = sysconfig.get_config_vars()
    python = ["-isystem", config["INCLUDEPY"], "-L", config["LIBDIR"], f"-Wl,-rpath,{config['LIBDIR']}"]
    subprocess.run(
        ["clang", *CLANG, *flags, *python, source, "-o", program, f"-lpython{config['LDVERSION']}"], check=True
    )
    return program


def main(seconds: str) -> int:
    if shutil.which("clang") is None:
        sys.exit(NEEDED)
    folder = ROOT / "build" / "fuzz"
    found = folder / "found"
    found.mkdir(parents=True, exist_ok=True)
    command = [build(folder), *LIMITS, f"-max_total_time={seconds}", f"-artifact_prefix={folder}/", found, CORPUS]
    code = subprocess.run([*command, "-print_final_stats=1"]).returncode
    if code:
        print(f"A finding: put its input, {folder}/crash-..., into {CORPUS}/<framer>/, where the tests run it.")
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
