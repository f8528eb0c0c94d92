# setup  make .venv with arsp in it            demo       the main job for real, in minutes
# test   all tests that need no GPU, JOBS=2     lint       ruff
# gpu-check OUT=DIR   GPU tests and timings, recorded in DIR
PYTHON ?= python3
OUT ?= out/gpu-check
JOBS ?= 2
BIN := .venv/bin
STAMP := .venv/.arsp-installed
export OMP_WAIT_POLICY := PASSIVE

.PHONY: setup demo test lint gpu-check clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/python examples/demo.py

test: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

lint: setup
	$(BIN)/ruff check .

gpu-check: setup
	$(BIN)/python benchmarks/gpu_check.py --out $(OUT)

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
