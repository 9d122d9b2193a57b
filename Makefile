# `make demo` and `make test` set up all they need in .venv; they want python3, pip and make only.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := runs/demo

# What Python compiles of packages is kept, also where the environment forbids it: commands and
# tests start many processes, and each would compile all that it imports.
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo test docs lint format clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable ".[data,eval,gcs,s3,dev,docs]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python train.py --config configs/demo/model.py --workdir $(DEMO)/model
	$(BIN)/python train.py --config configs/demo/router.py --workdir $(DEMO)/router-low \
		--objective.skip-weight 0.5
	$(BIN)/python train.py --config configs/demo/router.py --workdir $(DEMO)/router-mid \
		--objective.skip-weight 1
	$(BIN)/python train.py --config configs/demo/router.py --workdir $(DEMO)/router-high \
		--objective.skip-weight 2
	$(BIN)/python eval.py --config configs/demo/sweep.py --workdir $(DEMO)/sweep
	$(BIN)/python eval.py --config configs/demo/representation.py --workdir $(DEMO)/representation
	$(BIN)/dials watch $(DEMO)/model --router $(DEMO)/router-high --max-new-tokens 5 \
		--prompt "s37,58=" --prompt "r12,34=" --out $(DEMO)/replay.html

# Compiled programs are kept in .cache/tests: workers share them, and so does the next run.
test: $(VENV)/.installed
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The site, into site/; a warning is an error. tests/test_docs_site.py builds it, too.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo site/index.html

lint: $(VENV)/.installed
	$(BIN)/python -m ruff check .

format: $(VENV)/.installed
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

clean:
	rm -rf $(DEMO) site .pytest_cache .ruff_cache .cache
