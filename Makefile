# make train: set up on a fresh machine, then train the default. make test: likewise, then test.
VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/ready
ARGS ?=
# one more than cores: the tests on a cluster, which come first, mostly wait
WORKERS := $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)

.PHONY: train test zoo lint clean

train: $(READY)
	$(PYTHON) -m app.train $(ARGS)

test: $(READY) lint
	$(PYTHON) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not gpu" $(ARGS)

# each foreign model, loader and schedule in each column of the table; ten minutes
zoo: $(READY)
	APP_TEST_ZOO=all $(PYTHON) -m pytest tests/zoo -n $(WORKERS) $(ARGS)

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(READY): pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) dist
