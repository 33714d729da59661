# The only entrances: make demo, make test, make check.

VENV = .venv
PYTHON = $(VENV)/bin/python
STAMP = $(VENV)/installed

.PHONY: demo test check clean

demo: $(STAMP)
	$(PYTHON) tests/demo.py

test: $(STAMP)
	$(PYTHON) -m pytest

check: $(STAMP)
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(PYTHON) -m pytest -q tests/test_layers.py

clean:
	rm -rf $(VENV) build *.egg-info

$(STAMP): setup.cfg pyproject.toml
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo 'blockdiff needs Python 3.10 or newer on the server' >&2; exit 1; }
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --editable '.[test]'
	touch $@
