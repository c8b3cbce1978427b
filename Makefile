# make quickstart: install, train on real pictures, sample, report.  make test: install, run the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

RUN := runs/quickstart
CONFIG := configs/quickstart.yaml
# An interrupted quickstart goes on where it stopped; `rm -r runs/quickstart` starts anew.

.PHONY: quickstart test check format lint types bench clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: $(READY)
	test -d $(RUN)/data || $(BIN)/zsnr data openmoji $(RUN)/data --glyphs demo
	$(BIN)/zsnr fit -c $(CONFIG) --ckpt_path last
	$(BIN)/zsnr predict -c $(CONFIG) --ckpt_path $(RUN)/checkpoints/last.ckpt --output $(RUN)/samples
	$(BIN)/zsnr report $(RUN) --data $(RUN)/data

test: $(READY)
	$(BIN)/python -m pytest

check: lint types test

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)
	$(BIN)/python benchmarks/sampler_step.py --write
	$(BIN)/python benchmarks/data_throughput.py --write

clean:
	rm -rf $(VENV) runs
