# Everything happens in .venv and build/; nothing outside the repository is touched.
PYTHON ?= python3
SECONDS ?= 30
MINUTES ?= 60
JOBS ?= 1
WORKERS ?= 2
FILES ?=
TESTS ?= tests
PYTHONS ?= $(or $(wildcard $(HOME)/.pyenv/versions/3.1[1-9]*/bin/python),$(PYTHON))
VENV := .venv
SANITIZED := $(CURDIR)/build/sanitized
ASSERTING := $(CURDIR)/build/asserting
RACED := $(CURDIR)/build/tsan
FREE := build/free-threaded
# A free-threaded CPython >= 3.13, and one that was built with ThreadSanitizer as well.
MUXCORE_FREETHREADED_PYTHON ?= $(or $(lastword $(wildcard $(HOME)/.pyenv/versions/3.1*t/bin/python)),$(shell command -v python3.14t || command -v python3.13t))
MUXCORE_TSAN_PYTHON ?=
OPERATIONS ?= 1000000
# The path of pyenv's CPython of that version with a GIL; nothing if it has none.
python = $(lastword $(filter-out %t/bin/python,$(wildcard $(HOME)/.pyenv/versions/$(1).*/bin/python)))
COVERED := $(CURDIR)/build/covered
PY := $(VENV)/bin/python
PRELOAD_ASAN = LD_PRELOAD="$$(cc -print-file-name=libasan.so)"
WITH_ASAN = PYTHONPATH=$(SANITIZED)/lib PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0 $(PRELOAD_ASAN)
# The library that makes calls fail, and libFuzzer with its own ASan, have to come first in a process, as this one has; and
# the others measure the memory of a process, which ASan keeps for a while, the extension's size, or milliseconds.
NOT_UNDER_ASAN = --ignore=tests/test_faults.py $(addprefix --deselect=tests/test_, \
	epoll.py::test_the_memory_of_a_large_batch_is_given_back \
	fuzz.py::test_nothing_is_wrong_with_known_inputs \
	fuzz.py::test_nothing_is_found_and_both_cores_read_what_is_the_same \
	hostile.py::test_an_unfinished_message_costs_three_times_max_size_at_most \
	hostile.py::test_clients_that_come_and_go_leave_nothing_behind \
	hostile.py::test_floods_of_empty_requests_delay_no_timer \
	mux.py::test_a_mux_that_is_closed_gives_its_batch_back \
	package.py::test_a_wheel_is_smaller_than_a_mebibyte \
	proxy.py::test_a_gigabyte_from_a_fast_sender_to_a_slow_reader_uses_no_memory \
	proxy.py::test_neither_end_reads_and_memory_stays \
	soak.py::test_a_whole_server_loses_nothing_and_stays_flat)
# What can run in several threads at once: tests that share nothing but the module.
PARALLEL = tests/test_config.py tests/test_handler.py tests/test_epoll.py tests/test_cores.py tests/test_framing.py
UNSAFE_FIXTURES = $$(printf '%s\n' mux listen caplog capsys monkeypatch socket_path big_file ep pair)
SOURCES := pyproject.toml setup.py $(wildcard src/muxcore/*.pyx src/muxcore/*.pxd src/muxcore/_core/*)

.PHONY: demo test lint bench instructions docs faults fuzz fuzz-server soak sanitize leaks hostile hostile-without mutants coverage assert valgrind \
	free-threaded hammer tsan which-free-threaded wheels clean

demo: $(VENV)/.built
	$(PY) -m muxcore demo

# In two processes: nearly half of the time, a test waits. -n 0 is one process, for pdb and -s.
test: $(VENV)/.built
	$(PY) -m pytest -n $(WORKERS) $(TESTS)

# The same on another CPython, of pyenv's, in a venv of its own: make test-3.13
test-3.%:
	@test -n "$(call python,3.$*)" || { echo "there is no CPython 3.$* here: pyenv install 3.$*"; exit 1; }
	$(MAKE) --no-print-directory test PYTHON=$(call python,3.$*) VENV=build/python3.$*

lint: $(VENV)/.built
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m mypy.stubtest muxcore --allowlist tests/stubtest-allowlist.txt
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" basedpyright
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" basedpyright --verifytypes muxcore --ignoreexternal
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cython-lint src/muxcore tests/fuzz
	$(VENV)/bin/zizmor --offline --quiet .github

# Many workloads against all peers that are installed, in about ten minutes.
bench: $(VENV)/.bench
	$(PY) benchmarks/bench_suite.py

# What an echoed message may cost in user space, counted by callgrind: the same on every machine with the same Python.
instructions: $(VENV)/.bench
	$(PY) benchmarks/bench_instructions.py --keep --table messages --only callback --connections 100 --most 1150

# HTML in docs/_build. A warning is an error.
docs: $(VENV)/.built
	$(PY) -m pip install --quiet --group docs
	$(PY) -m sphinx -W --keep-going --quiet --fresh-env docs docs/_build

faults: $(VENV)/.built
	FAULTS_STRIDE=1 $(PY) -m pytest -s tests/test_faults.py

fuzz: $(VENV)/.built
	$(PY) tests/fuzz/run.py $(SECONDS)

fuzz-server: $(VENV)/.built
	$(PY) tests/fuzz/server.py $(SECONDS)

# A whole server for so long, everything verified, memory and descriptors flat; the plot is build/soak.svg.
soak: $(VENV)/.bench
	nice $(PY) tests/soak/run.py $(MINUTES) --plot build/soak.svg

# All tests that can, on the extension under ASan and UBSan, in a folder of its own. What ASan says must not end in
# pytest's capture: it ends the process.
sanitize: $(VENV)/.built
	MUXCORE_SANITIZE=address,undefined $(PY) setup.py --quiet build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	printf '%s\n' '#!/bin/sh' '$(PRELOAD_ASAN) exec $(CURDIR)/$(PY) "$$@"' >$(SANITIZED)/python
	chmod +x $(SANITIZED)/python
	MUXCORE_TEST_PYTHON=$(SANITIZED)/python $(WITH_ASAN) $(PY) -m pytest --capture=sys --timeout=600 tests $(NOT_UNDER_ASAN)
	$(WITH_ASAN) $(PY) tests/fuzz/server.py $(SECONDS) 0 epoll

# Hostile user code at every call that may run it (tests/hostile/README.md), on the extension under ASan and UBSan: every
# point with every action, then programs of several for SECONDS each, with the collector and signals at any moment.
hostile: $(VENV)/.built
	MUXCORE_SANITIZE=address,undefined $(PY) setup.py --quiet build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	$(WITH_ASAN) $(PY) tests/hostile/run.py --exhaustive
	$(WITH_ASAN) $(PY) tests/hostile/run.py --random $(SECONDS) --gc
	$(WITH_ASAN) $(PY) tests/hostile/run.py --random $(SECONDS) --gc --signals

# Whether that harness finds each known fault again, when its fix alone is taken out of today's source.
hostile-without: $(VENV)/.built
	nice $(PY) tests/hostile/without.py

# Mutants of both cores, and whether a test finds them (tests/mutants/README.md): make mutants SECONDS=600 FILES=_core/outbox.pxi
mutants: $(VENV)/.built
	nice $(PY) tests/mutants/run.py --seconds $(SECONDS) --jobs $(JOBS) $(FILES)

# A wheel for each of PYTHONS, the pure one and the sdist, all tested as they are installed, in dist/.
wheels: $(VENV)/.made
	$(PY) -m pip install --quiet --group wheels
	.ci/wheels $(PYTHONS)

# With PYTHONMALLOC=malloc each object is an allocation that the leak checker sees.
leaks: $(VENV)/.built
	MUXCORE_SANITIZE=address $(PY) setup.py --quiet build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	PYTHONPATH=$(SANITIZED)/lib:tests PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=1:fast_unwind_on_malloc=0 \
	$(PRELOAD_ASAN) $(PY) tests/sanitizers/short_run.py

# All tests, on an extension that checks its invariants after every turn of the loop, and with Python's own checks.
assert: $(VENV)/.built
	MUXCORE_ASSERT=1 $(PY) setup.py --quiet build --build-base $(ASSERTING) --build-lib $(ASSERTING)/lib
	MUXCORE_ASSERT=1 PYTHONPATH=$(ASSERTING)/lib PYTHONMALLOC=debug PYTHONDEVMODE=1 $(PY) -W error -m pytest --capture=sys tests

# memcheck has something to say of CPython (small integers, whose index it takes for uninitialised). So a report counts
# here if the extension has a frame in it.
valgrind: $(VENV)/.built
	PYTHONPATH=tests PYTHONMALLOC=malloc valgrind --quiet --num-callers=40 --log-file=build/valgrind.log \
	$(PY) tests/sanitizers/short_run.py
	! grep _epoll build/valgrind.log

# The tests without a GIL; then those that can, in four threads at once.
free-threaded: $(FREE)/.built
	PYTHON_GIL=0 $(FREE)/bin/python -m pytest -p no:run_parallel tests
	PYTHON_GIL=0 $(FREE)/bin/python -m pytest --parallel-threads=4 -o thread_unsafe_fixtures="$(UNSAFE_FIXTURES)" $(PARALLEL)

# So many operations of many threads on one Mux, and nothing lost, on every core, with and without a GIL.
hammer: $(VENV)/.built $(FREE)/.built
	MUXCORE_HAMMER=$(OPERATIONS) $(PY) -m pytest --durations=10 tests/test_freethreading.py -k "nothing_is_lost or counted"
	MUXCORE_HAMMER=$(OPERATIONS) PYTHON_GIL=0 $(FREE)/bin/python -m pytest -p no:run_parallel --durations=10 \
	tests/test_freethreading.py -k "nothing_is_lost or counted"

# libtsan does not know the randomised addresses of newer kernels, hence setarch. The interpreter has to be built with
# TSan as well, or its locks would be unknown and everything a race:
# PYTHON_CONFIGURE_OPTS="--disable-gil --with-thread-sanitizer" pyenv install 3.13t
tsan: $(FREE)/.built
	@test -n "$(MUXCORE_TSAN_PYTHON)" || { echo "set MUXCORE_TSAN_PYTHON to a free-threaded CPython built --with-thread-sanitizer, of the version of $(MUXCORE_FREETHREADED_PYTHON)"; exit 1; }
	MUXCORE_SANITIZE=thread $(FREE)/bin/python setup.py --quiet build --build-base $(RACED) --build-lib $(RACED)/lib
	PYTHONPATH=$(RACED)/lib:$$($(FREE)/bin/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))') \
	TSAN_OPTIONS="exitcode=66 history_size=7 suppressions=$(CURDIR)/tests/sanitizers/tsan.supp" \
	setarch -R $(MUXCORE_TSAN_PYTHON) -m pytest -p no:run_parallel --capture=sys --timeout=600 -k epoll \
	tests/test_freethreading.py tests/test_threads.py tests/test_mux.py

which-3.%:
	@echo $(call python,3.$*)

which-free-threaded:
	@echo $(MUXCORE_FREETHREADED_PYTHON)

$(FREE)/.built: $(SOURCES)
	@test -n "$(MUXCORE_FREETHREADED_PYTHON)" || { echo "needs a free-threaded CPython >= 3.13: set MUXCORE_FREETHREADED_PYTHON, or pyenv install 3.13t"; exit 1; }
	$(MUXCORE_FREETHREADED_PYTHON) -m venv $(FREE)
	$(FREE)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(FREE)/bin/python -m pip install --quiet --prefer-binary --group test-core 'setuptools>=77' 'pytest-run-parallel>=0.7,<1'
	$(FREE)/bin/python -m pip install --quiet --no-build-isolation --config-settings editable_mode=compat --editable .
	touch $@

# Which lines the tests run, of Python with its branches, and of the extension, built in a folder of its own. Cython's
# plugin looks for a .pxd where the program was started, hence the links. Without memory the tracer itself fails;
# and a test that fails since it is traced (there is one of the extension's size) does not prevent the report.
coverage: export PYTHONPATH = $(COVERED)/src
coverage: $(VENV)/.built
	rm -rf $(COVERED) && mkdir -p $(COVERED) && cp -r setup.py pyproject.toml README.md src $(COVERED)
	rm -f $(COVERED)/src/muxcore/*.so
	cd $(COVERED) && MUXCORE_COVERAGE=1 $(CURDIR)/$(PY) setup.py --quiet build_ext --inplace
	cp tests/sanitizers/traced.py $(COVERED)/src && $(VENV)/bin/cythonize -3 -q -i $(COVERED)/src/traced.py
	cd $(COVERED) && ln -s src/muxcore/*.pxd src/muxcore/_core .
	-cd $(COVERED) && $(CURDIR)/$(PY) -m coverage run -m pytest --timeout=600 $(CURDIR)/tests \
	--deselect=tests/test_faults.py::test_whichever_allocation_of_python_fails_nothing_is_lost_that_is_not_reported
	cd $(COVERED) && $(CURDIR)/$(PY) -m coverage combine --quiet
	cd $(COVERED) && $(CURDIR)/$(PY) -m coverage report --skip-covered --include='*.py'
	cd $(COVERED) && $(CURDIR)/$(PY) -m coverage report --skip-covered --omit='*.py'

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
