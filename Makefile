# Two commands on a fresh machine that has Python (3.11 or later), pip and make: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

export RAY_AUTH_MODE ?= disabled
# As pip does: trust the certificates of the machine, also behind a proxy that has its own.
export UV_SYSTEM_CERTS ?= true

.PHONY: env quickstart test test-slow check format lock reference submit clean

env: $(VENV)/installed

# Bytecode is compiled once here: Ray starts many processes, and each would compile torch again.
$(VENV)/installed: requirements.lock requirements-uv.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=<path>")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements-uv.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --compile-bytecode -r requirements.lock
	touch $@

quickstart: env
	$(BIN)/python jobs/distill.py recipes/quickstart.yaml

test: env
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

# The rest: whole jobs that are submitted, killed, or lose a node or a server, and are started again; long fits.
test-slow: env
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Versions and hashes for every platform; no index address is recorded.
lock: env
	$(BIN)/uv pip compile pyproject.toml --group dev --extra coreml --universal --python-version 3.11 --generate-hashes \
	  --no-header --no-annotate --no-emit-index-url --quiet -o requirements.lock

# docs/reference.md from the code.
reference: env
	$(BIN)/python docs/reference.py

# In JOB a line may go on on the next one, where make would end the command.
define NEWLINE


endef

# A job on the cluster whose dashboard is at 127.0.0.1:8265: make submit JOB="jobs/distill.py recipes/own_images.yaml ..."
submit: env
	$(BIN)/python jobs/submit.py $(subst $(NEWLINE), ,$(JOB))

clean:
	rm -rf $(VENV) work
