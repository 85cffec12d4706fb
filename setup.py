"""Builds the one extension where there is epoll to build it for; everything declarative is in pyproject.toml.

MUXCORE_NO_EXTENSIONS=1 builds a pure-Python package, which runs on the fallback core.
MUXCORE_ASSERT=1 builds the extension with checks of all that has to be true between two turns of the loop.
MUXCORE_COVERAGE=1 builds an extension that reports each line to a tracer, for `make coverage`.
MUXCORE_SANITIZE=address,undefined builds the extension with these of the compiler's sanitizers.
"""

import os
import re
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# -O2 and no debug information, whatever Python itself was built with; later flags win.
FLAGS = ["-O2", "-g0", "-DNDEBUG", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-missing-field-initializers"]
FLAGS += ["-fno-plt"]  # one jump less for each call into Python or libc; they are bound when it is loaded
# `inline` is meant: left to itself, the compiler keeps half of them as calls (13% more instructions per framed line).
FLAGS += ["-DCYTHON_INLINE=inline __attribute__((always_inline))"]
SANITIZERS = [f"-fsanitize={os.environ['MUXCORE_SANITIZE']}"] if os.environ.get("MUXCORE_SANITIZE") else []
if os.environ.get("MUXCORE_ASSERT") == "1":
    FLAGS += ["-UNDEBUG", "-DMUXCORE_ASSERT", "-g1"]
if SANITIZERS:
    FLAGS += [*SANITIZERS, "-fno-sanitize-recover=all", "-g1"]
DIRECTIVES = {
    "language_level": "3",
    "boundscheck": False,
    "wraparound": False,
    "initializedcheck": False,
    "cdivision": True,
    "auto_pickle": False,
    "freethreading_compatible": True,  # importing it leaves the GIL off, where it is
    "binding": False,  # plain method descriptors: the interpreter has a fast path for calling those
    "embedsignature": True,
    "embedsignature.format": "clinic",
}

COVERAGE = os.environ.get("MUXCORE_COVERAGE") == "1"
if COVERAGE:
    FLAGS += ["-O0", "-DCYTHON_TRACE=1", "-DCYTHON_TRACE_NOGIL=1"]
    DIRECTIVES["linetrace"] = True


class BuildExtension(build_ext):
    """build_ext that says what to do when there is no compiler."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            raise SystemExit(
                f"muxcore: the extension could not be built: {error}\n"
                "Install a C compiler (Debian: apt install gcc libc6-dev python3-dev) and try again,\n"
                "or set MUXCORE_NO_EXTENSIONS=1 to install the pure-Python core, which is many times slower."
            ) from error


def extensions() -> list[Extension]:
    if os.environ.get("MUXCORE_NO_EXTENSIONS") == "1" or not sys.platform.startswith("linux"):
        return []
    from Cython.Build import cythonize

    extension = Extension(
        "muxcore._epoll",
        ["src/muxcore/_epoll.pyx"],
        depends=[str(path) for path in Path("src/muxcore").rglob("*.px[di]")],
        extra_compile_args=FLAGS,
        extra_link_args=SANITIZERS,
        libraries=["dl"],  # part of libc since glibc 2.34
    )
    # Cython's plugin for coverage looks for the C file beside the source.
    return cythonize(extension, build_dir=None if COVERAGE else "build/cython", compiler_directives=DIRECTIVES)


def metadata() -> dict[str, Any]:
    """Links for an index's page, to the repository and tag that GitHub's runners name. Elsewhere the README's links
    stay relative, and the metadata has no URLs."""
    readme = Path("README.md").read_text(encoding="utf-8")
    fields: dict[str, Any] = {"long_description_content_type": "text/markdown"}
    if name := os.environ.get("GITHUB_REPOSITORY"):
        url = f"{os.environ.get('GITHUB_SERVER_URL', 'https://github.com')}/{name}"
        tag = os.environ.get("GITHUB_REF_NAME", "HEAD")
        readme = re.sub(r"(!\[[^]]*\]\()(?!\w+:)", rf"\g<1>{url}/raw/{tag}/", readme)
        readme = re.sub(r"(?<!!)(\[[^]]*\]\()(?!\w+:|#)", rf"\g<1>{url}/blob/{tag}/", readme)
        fields["project_urls"] = {
            "Source": url,
            "Documentation": f"{url}/blob/{tag}/docs/index.md",
            "Changelog": f"{url}/blob/{tag}/CHANGELOG.md",
            "Issues": f"{url}/issues",
        }
    return {**fields, "long_description": readme}


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension}, **metadata())
