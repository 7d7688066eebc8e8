# `make demo` and `make test` are the two commands of the README; both work from a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Test files run side by side; those of one file stay together, they share what they compile.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: demo test test-fast test-exhaustive sanitize mutate install install-dev lint typecheck docs bench clean

demo: install
	$(BIN)/graphopt demo

install: $(VENV)/.installed

# Plain (not editable) install: what `make demo` runs is what a user gets.
$(VENV)/.installed: pyproject.toml $(shell find graphopt passes codegen runtime models -name '*.py' -o -name '*.cpp' -o -name '*.h' -o -name '*.js' -o -name '*.css' -o -name '*.html' 2>/dev/null)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python tools/install.py .
	touch $@

install-dev:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python tools/install.py -e '.[dev]'

test: install-dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python tools/typecheck.py
	$(PYTEST)

test-fast: install-dev
	$(PYTEST) -m "not real_model and not slow"

# Everything, the tests of many minutes too.
test-exhaustive: install-dev
	$(PYTEST) --exhaustive

# The native kernels' tests under ASan and UBSan, recorded plans under TSan.
sanitize: install-dev
	$(BIN)/python tools/sanitize.py address
	$(BIN)/python tools/sanitize.py thread --callers 8 --rounds 1000 --prove

# Draws small changes of the source and says which of them no test notices: SEED=7 COUNT=20
# AREA="masks fuse" TIMEOUT=60 (docs/reliability.md).
SEED ?= 1
COUNT ?= 100
TIMEOUT ?= 120
mutate: install-dev
	$(BIN)/python -m tools.mutation --seed $(SEED) --count $(COUNT) --timeout $(TIMEOUT) \
		$(addprefix --area ,$(AREA))

lint:
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

typecheck:
	$(BIN)/python tools/typecheck.py

bench: install-dev
	$(BIN)/python -m pip install '.[bench]'
	$(BIN)/python benchmarks/decode_cpu.py

clean:
	rm -rf $(VENV) build dist *.egg-info
