# The first two commands are `make demo` and `make test`. They need python3 (3.10 or newer) and make, nothing else.
# Written for GNU make 3.81 and a plain sh, which is what macOS has.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Which Python to build the environment with: make PYTHON=python3.12 test
PYTHON ?=
EXTRAS ?= dev

.PHONY: help install demo test lint types clean

help:
	@echo "make demo    ask the bundled model about a bundled picture"
	@echo "make test    run the tests"
	@echo "make lint    check style; make types: check types"
	@echo "make clean   remove the environment and everything generated"

install: $(STAMP)

# Runs again only when what has to be installed changes: the code itself is installed in place.
$(STAMP): pyproject.toml constraints.txt
	@set -e; \
	rm -f "$(STAMP)"; \
	python=""; \
	for candidate in "$(PYTHON)" python3 python3.13 python3.12 python3.11 python3.10; do \
		if [ -n "$$candidate" ] && "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then \
			python="$$candidate"; break; \
		fi; \
		if [ -n "$$candidate" ] && [ "$$candidate" = "$(PYTHON)" ]; then break; fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo "error: Python 3.10 or newer is needed, and $(if $(PYTHON),$(PYTHON),python3) is not: name one with make PYTHON=/path/to/python3" >&2; \
		exit 1; \
	fi; \
	echo "Setting up $(VENV) with $$("$$python" --version) (once; a few minutes)"; \
	if command -v uv >/dev/null 2>&1; then \
		uv venv --quiet --clear --python "$$python" "$(VENV)"; \
		VIRTUAL_ENV="$(VENV)" uv pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'; \
	else \
		"$$python" -m venv --clear "$(VENV)" || { \
			echo "error: $$python cannot make an environment (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }; \
		"$(BIN)/python" -m pip install --quiet --disable-pip-version-check \
			--constraint constraints.txt --editable '.[$(EXTRAS)]'; \
	fi; \
	touch "$(STAMP)"

demo: $(STAMP)
	@echo '$$ fastvlm-mlx generate --image examples/shapes.png "How many circles are there?"'
	@"$(BIN)/fastvlm-mlx" generate --image examples/shapes.png "How many circles are there?"

test: $(STAMP)
	@"$(BIN)/python" -m pytest

lint: $(STAMP)
	@"$(BIN)/ruff" check .
	@"$(BIN)/ruff" format --check .

types: $(STAMP)
	@"$(BIN)/mypy"

clean:
	rm -rf "$(VENV)" build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
