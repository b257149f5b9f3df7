# make demo   installs into .venv, trains both demos on built-in real data, checks and shows their results
# make test   installs into .venv, checks the style, runs the tests
# make test-floor   the tests of kernels and networks with the oldest releases that pyproject.toml allows
# make test-mm   installs mmdetection and mmsegmentation into .venv-mm, tests the plug-in and trains its examples
# make lint   ruff and pyright alone

PYTHON ?= python3
BIN := .venv/bin
# One thread per test process: two processes of two threads on two cores wait for each other.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

FLOOR := tests/kernels tests/layers tests/models/test_parity.py tests/models/test_models.py tests/models/test_adapters.py

.PHONY: demo test test-slow test-floor test-mm lint clean

demo: .venv/demo
	rm -rf runs/demo
	$(BIN)/python tools/train.py configs/classification/biformer_digits.yaml output=runs/demo/digits
	$(BIN)/python tools/train.py configs/restoration/hat_photographs_x2.yaml output=runs/demo/photographs
	$(BIN)/python tools/evaluate.py runs/demo/digits --require 'top1>=97'
	$(BIN)/python tools/evaluate.py runs/demo/photographs --require 'gain_over_bicubic>=0.5'
	@echo "low resolution, bicubic, ours, truth: runs/demo/photographs/pictures/comparison.png"

test: lint
	$(TEST)

test-slow: .venv/dev
	$(TEST) -m slow

# Of PyTorch, torchvision and timm the oldest, which other libraries then have to fit.
test-floor: .venv-floor/ready
	OMP_NUM_THREADS=1 .venv-floor/bin/python -m pytest -n 2 $(FLOOR)

.venv-floor/ready: pyproject.toml
	$(PYTHON) -m venv .venv-floor
	sed -nE 's/^ *"(torch|torchvision|timm)>=([0-9.]+)",$$/\1==\2/p' pyproject.toml > .venv-floor/oldest.txt
	.venv-floor/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-floor/oldest.txt -e '.[demo,lmdb,hyperspectral,test]'
	touch $@

# An environment of its own, because the versions that these packages allow hold others back.
test-mm: .venv-mm/ready
	OMP_NUM_THREADS=1 .venv-mm/bin/python -m pytest -n 2 tests/integrations/openmmlab

.venv-mm/ready: pyproject.toml
	$(PYTHON) -m venv .venv-mm
	.venv-mm/bin/python -m pip install --quiet --disable-pip-version-check -e '.[openmmlab,demo,test]'
	touch $@

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo .venv/dev: .venv/%: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	touch $@

clean:
	rm -rf .venv .venv-floor .venv-mm build *.egg-info
