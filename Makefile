# `make quickstart` and `make test` need Python 3.11 or newer and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart

.PHONY: quickstart test test-all lint type docs package gpu-check clean

# One environment for every target, rebuilt only when pyproject.toml changes: first what training needs, then, where
# a target asks for it, the tools. The stamps are written last, so that an interrupted set-up starts again.
$(VENV)/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + " (make PYTHON=python3.12 …)")'
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[train,lite]'
	touch $@

$(VENV)/dev: $(VENV)/ready
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

quickstart: $(VENV)/ready
	rm -rf $(RUN)
	$(BIN)/effseg predict --output $(RUN)/first --score 0.5 docs/images/grace_hopper.jpg
	@echo "picture:        $(RUN)/first/overlays/grace_hopper.jpg  (the model in the package)"
	$(BIN)/effseg fit --config configs/quickstart.yaml --trainer.default_root_dir $(RUN)/shapes
	$(BIN)/effseg validate --config $(RUN)/shapes/config.yaml --ckpt_path $(RUN)/shapes/checkpoints/best.ckpt
	$(BIN)/effseg predict --model $(RUN)/shapes --output $(RUN)/predictions datasets/shapes/JPEGImages/val_00000.jpg
	@echo
	@echo "first picture:  $(RUN)/first/overlays/grace_hopper.jpg"
	@echo "trained model:  $(RUN)/shapes/model  (effseg.from_pretrained)"
	@echo "pictures:       $(RUN)/shapes/pictures  (image, truth, prediction)"
	@echo "masks, overlay: $(RUN)/predictions"

# A process for each core, four at most, with one thread each: threads of several processes wait for one another.
test: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile -m "not slow and not gpu" --cov --cov-report=term --cov-fail-under=90

test-all: $(VENV)/dev
	$(BIN)/python -m pytest

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

type: $(VENV)/dev
	$(BIN)/mypy

docs: $(VENV)/dev
	$(BIN)/mkdocs build --strict

# Wheel and source archive, checked, and the wheel imported from elsewhere than this folder.
package: $(VENV)/dev
	rm -rf dist build/wheel
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	$(BIN)/pip install --quiet --no-deps --target build/wheel dist/*.whl
	cd build/wheel && PYTHONPATH=. ../../$(BIN)/python -c 'import effseg, pathlib; assert pathlib.Path(effseg.__file__).is_relative_to(pathlib.Path.cwd())'
	cd build/wheel && PYTHONPATH=. ../../$(BIN)/python -m effseg.cli info effseg_lite0

# On a machine with a GPU, with its own Python and no network.
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .coverage
