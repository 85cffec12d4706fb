"""Builds the one extension; everything declarative is in pyproject.toml."""

from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

# -O2 and no debug information, whatever Python itself was built with; later flags win.
FLAGS = ["-O2", "-g0", "-DNDEBUG", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-missing-field-initializers"]

setup(
    ext_modules=cythonize(
        Extension(
            "muxcore._epoll",
            ["src/muxcore/_epoll.pyx"],
            depends=[str(path) for path in Path("src/muxcore").glob("*.px[di]")],
            extra_compile_args=FLAGS,
        ),
        build_dir="build/cython",
        compiler_directives={
            "language_level": "3",
            "boundscheck": False,
            "wraparound": False,
            "initializedcheck": False,
            "cdivision": True,
            "auto_pickle": False,
            "embedsignature": True,
            "embedsignature.format": "clinic",
        },
    )
)
