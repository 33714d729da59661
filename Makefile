# The only entrances: make demo, make quick, make test, make torture, make check, make lab, make bench,
# make explore, make fuzz, make mutants.

VENV = .venv
PYTHON = $(VENV)/bin/python
# a plain path: what setuptools does by default adds 30 ms to each start of Python
EDITABLE = --config-settings editable_mode=compat --editable
# what the tests are known to pass with; tests/dependencies.py tries the oldest and the newest
CONSTRAINTS = --constraint tests/constraints.txt

.PHONY: demo quick test torture check lab bench explore fuzz mutants clean

demo: $(VENV)/installed
	$(PYTHON) tests/demo.py

quick: $(VENV)/installed-for-tests
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(PYTHON) -m pytest -q -n 2 --dist loadfile -m 'not torture and not slow'

test: $(VENV)/installed-for-tests
	$(PYTHON) -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m 'not torture'

torture: $(VENV)/installed-for-tests
	$(PYTHON) -m pytest -n 3 --dist worksteal -m torture

check: $(VENV)/installed-for-tests
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(PYTHON) -m pytest -q tests/test_layers.py

lab: $(VENV)/installed-for-tests
	$(PYTHON) -m tests.lab

bench: $(VENV)/installed-for-tests
	$(PYTHON) -m bench $(PEERS)

explore: $(VENV)/installed-for-tests
	BLOCKDIFF_EXPLORE=1 $(PYTHON) -m pytest -n 2 --dist loadfile $$(grep -l hypothesis tests/test_*.py)

fuzz: $(VENV)/installed-for-fuzzing
	$(PYTHON) -m tests.fuzz $(TARGET) $(SECONDS)

mutants: $(VENV)/installed-for-tests
	$(PYTHON) -m tests.mutants $(MODULES)

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/installed: setup.cfg pyproject.toml tests/constraints.txt
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo 'the server side of blockdiff needs python3 of version 3.10 or newer' >&2; exit 1; }
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) $(EDITABLE) .
	touch $@

$(VENV)/installed-for-tests: $(VENV)/installed
	$(PYTHON) -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) $(EDITABLE) '.[test]'
	touch $@

$(VENV)/installed-for-fuzzing: $(VENV)/installed-for-tests
	$(PYTHON) -m pip install --quiet --disable-pip-version-check $(EDITABLE) '.[test,fuzz]'
	touch $@
