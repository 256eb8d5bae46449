# make demo          the main job, small, on this machine, with its GPUs if it has any
# make test          the tests to run before a commit: all but the long ones
# make test-fast     tests that take seconds
# make test-ci       all tests but the full sweeps
# make test-full     all tests
# make lint          format, lint, types, shell scripts
# make setup         .venv with pinned packages; the other targets need it
# make slurm         Slurm from the distribution's packages, for the cluster tests (root or sudo)
# make docs          writes docs/configuration.md from the fields of the settings
# make requirements  compiles requirements.txt from pyproject.toml

PYTHON ?= python3
UV_VERSION := 0.13.9
RUN := .venv/bin/python
READY := .venv/.ready
PARALLEL := --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: setup demo test test-fast test-ci test-full lint slurm docs requirements

setup: $(READY)

$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; name one with make PYTHON=…" >&2; exit 2; }
	$(PYTHON) -m venv .venv || { echo "error: the venv module is missing; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	$(RUN) -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	.venv/bin/uv pip install --quiet --compile-bytecode --python $(RUN) -r requirements.txt
	@touch $@

demo: $(READY)
	@$(RUN) -m examples.demo

test: $(READY) slurm
	$(RUN) -m pytest $(PARALLEL) -m "not long and not full"

test-ci: $(READY) slurm
	$(RUN) -m pytest $(PARALLEL) -m "not full"

test-fast: $(READY)
	$(RUN) -m pytest $(PARALLEL) -m "not slow and not slurm and not long and not full"

test-full: $(READY) slurm
	$(RUN) -m pytest $(PARALLEL)

lint: $(READY)
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/shellcheck launch/*.sh

slurm:
	@tests/slurm/install.sh

requirements: $(READY)
	.venv/bin/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --no-emit-index-url --no-header --quiet -o requirements.txt

docs: $(READY)
	$(RUN) -m pretrain config --markdown > docs/configuration.md.new
	mv docs/configuration.md.new docs/configuration.md
