# Everything happens in .venv and build/; nothing outside the repository is touched.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
SOURCES := pyproject.toml setup.py $(wildcard src/muxcore/*.pyx src/muxcore/*.pxd src/muxcore/*.pxi)

.PHONY: demo test lint bench clean

demo: $(VENV)/.built
	$(PY) -m muxcore demo

test: $(VENV)/.built
	$(PY) -m pytest tests

lint: $(VENV)/.built
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m mypy.stubtest muxcore --allowlist tests/stubtest-allowlist.txt
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cython-lint src/muxcore

bench: $(VENV)/.bench
	$(PY) benchmarks/bench_echo.py

# pip before 25.1 knows no dependency groups, and venv brings the pip of its Python.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "muxcore needs Python >= 3.11; say which: make PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	touch $@

$(VENV)/.built: $(VENV)/.made $(SOURCES)
	$(PY) -m pip install --quiet --group dev
	$(PY) -m pip install --quiet --no-build-isolation --config-settings editable_mode=compat --editable '.[demo]'
	touch $@

$(VENV)/.bench: $(VENV)/.built
	$(PY) -m pip install --quiet --group bench
	touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info benchmarks/bin
	find src -name '*.so' -delete
