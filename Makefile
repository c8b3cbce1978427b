# make quickstart: install, train on real images, sample, report.  make test: install, run the tests.
# make docs: build the documentation site, site/index.html.
# make test-cluster: two nodes, SLURM and kills; half an hour, as root, in a container best.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST_OPTIONS ?=

RUN := runs/quickstart
CONFIG := configs/quickstart.yaml
# An interrupted quickstart resumes; after `rm -r runs/quickstart` it starts from scratch.

.PHONY: install quickstart test test-cluster docs wheel check format lint types bench clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

install: $(READY)

quickstart: $(READY)
	test -d $(RUN)/data || $(BIN)/zsnr data openmoji $(RUN)/data --glyphs demo
	$(BIN)/zsnr fit -c $(CONFIG) --ckpt_path last
	$(BIN)/zsnr predict -c $(CONFIG) --ckpt_path $(RUN)/checkpoints/last.ckpt --output $(RUN)/samples
	$(BIN)/python -m zsnr.reports.run $(RUN) --data $(RUN)/data

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile \
	  --no-loadscope-reorder $(PYTEST_OPTIONS)

wheel: $(READY)
	$(BIN)/python .ci/wheel.py

test-cluster: $(READY)
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  ! { command -v ip && command -v slurmctld && command -v munged; } >/dev/null; then \
	  apt-get update --quiet && apt-get install --yes --quiet iproute2 slurm-wlm munge; fi
	$(BIN)/python -m pytest tests/cluster -m cluster --write-results benchmarks/results/cluster.md

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

check: lint types docs test wheel

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
	$(BIN)/python benchmarks/fidelity.py --write
	$(BIN)/python benchmarks/data_throughput.py --write
	$(BIN)/python benchmarks/fuzz.py --write
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	$(BIN)/python benchmarks/train_step.py --write

clean:
	rm -rf $(VENV) runs site
