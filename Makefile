# Everything happens in .venv and build/; nothing outside the repository is touched.
PYTHON ?= python3
SECONDS ?= 30
PYTHONS ?= $(or $(wildcard $(HOME)/.pyenv/versions/3.1[1-9]*/bin/python),$(PYTHON))
VENV := .venv
SANITIZED := build/sanitized
PY := $(VENV)/bin/python
WITH_ASAN = PYTHONPATH=$(SANITIZED)/lib PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$(cc -print-file-name=libasan.so)"
SOURCES := pyproject.toml setup.py $(wildcard src/muxcore/*.pyx src/muxcore/*.pxd src/muxcore/*.pxi)

.PHONY: demo test lint bench faults fuzz fuzz-server sanitize wheels clean

demo: $(VENV)/.built
	$(PY) -m muxcore demo

test: $(VENV)/.built
	$(PY) -m pytest tests

lint: $(VENV)/.built
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m mypy.stubtest muxcore --allowlist tests/stubtest-allowlist.txt
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cython-lint src/muxcore tests/fuzz
	$(VENV)/bin/zizmor --offline --quiet .github

bench: $(VENV)/.bench
	$(PY) benchmarks/bench_echo.py

faults: $(VENV)/.built
	FAULTS_STRIDE=1 $(PY) -m pytest -s tests/test_faults.py

fuzz: $(VENV)/.built
	$(PY) tests/fuzz/run.py $(SECONDS)

fuzz-server: $(VENV)/.built
	$(PY) tests/fuzz/server.py $(SECONDS)

# The extension under ASan and UBSan, in a folder of its own, and the tests that feed it most. What ASan says must not
# end in pytest's capture: it ends the process.
sanitize: $(VENV)/.built
	MUXCORE_SANITIZE=address,undefined $(PY) setup.py --quiet build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	$(WITH_ASAN) $(PY) -m pytest --capture=sys \
		tests/test_messages.py tests/test_framing.py tests/test_cores.py tests/test_model.py
	$(WITH_ASAN) $(PY) tests/fuzz/server.py $(SECONDS) 0 epoll

# A wheel for each of PYTHONS, the pure one and the sdist, all tested as they are installed, in dist/.
wheels: $(VENV)/.made
	$(PY) -m pip install --quiet --group wheels
	.ci/wheels $(PYTHONS)

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
