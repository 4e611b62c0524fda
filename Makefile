PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
BASE ?=
FINETUNED ?=
EVALUATION ?=
OTHER_BASE ?=
INPUTS ?=

.PHONY: install report test mutants refresh bench

install: $(STAMP)

# The stamp is younger than the files it depends on when nothing has to be installed.
$(STAMP): pyproject.toml constraints.txt
	@echo "== install 1/3: virtual environment in .venv"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "== install 2/3: torch (the largest part, a minute or more)"
	@$(PIP) install --progress-bar off --constraint constraints.txt torch
	@echo "== install 3/3: delta_analysis with what its notebooks and tests need"
	@$(PIP) install --progress-bar off --constraint constraints.txt --editable ".[notebooks,test]"
	@touch $(STAMP)
	@echo "== install: done"

report: install
	@echo "== report: running the notebooks"
	@$(BIN)/python -m delta_analysis.reports.publish --base "$(BASE)" --finetuned "$(FINETUNED)" --evaluation "$(EVALUATION)" \
		--other-base "$(OTHER_BASE)" --inputs "$(INPUTS)"

# Types are checked beside the tests. Notebooks come first, since they take longest; what they measure is kept for
# each other and not for the next run.
test: install
	@echo "== test 1/2: ruff, types, pytest and the committed notebooks, cell by cell"
	@cells=$$(mktemp -d); \
	($(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy) > $$cells/checks.txt 2>&1 & checks=$$!; \
	DELTA_ANALYSIS_CELLS=$$cells OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder \
		--nbval --nbval-current-env --nbval-sanitize-with tests/nbval.cfg notebooks tests delta_analysis; tests=$$?; \
	wait $$checks; checks=$$?; cat $$cells/checks.txt; rm -r $$cells; \
	exit $$((tests | checks))
	@echo "== test 2/2: are the tables of the reports those that are committed"
	@$(BIN)/python -m tests.compare_results

mutants: install
	@$(BIN)/python tests/mutants.py

refresh: install
	@$(BIN)/python -m delta_analysis.reports.refresh

bench: install
	@echo "== bench: mergekit, mergelens and peft, to measure beside"
	@$(PIP) install --quiet --progress-bar off --constraint constraints.txt --editable ".[bench]"
	@echo "== bench: are merges those of mergekit"
	@$(BIN)/python -m pytest -W ignore benchmarks/test_agreement.py
	@$(BIN)/python -m benchmarks.run
