# Every target makes what it needs: .venv from requirements.lock, once, and again when the lock changes.
#   make train     train MAGE on Single Moving MNIST and print the table (DATASET=..., PRESET=...)
#   make test      the unit tests, and every notebook against its stored outputs
#   make lab       open the notebooks in JupyterLab
#   make bench     time training and generation, plain against fast
#   make notebooks run every notebook into out/ (PRESET=smoke by default)
#   make figures   draw the README's pictures again
#   make clean     remove .venv and out/, never trained weights or data

PYTHON ?= python3
DATASET ?= single-mnist
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
RUN := .venv/bin/python
# Notebooks train too: their kernels inherit the settings that the command lines give themselves.
FAST := env $$(.venv/bin/python -m mage_core.machine --allocator)
READY := .venv/.ready

.PHONY: train test lab bench notebooks figures clean environment always
.DELETE_ON_ERROR:

train: PRESET ?= quick
train: $(READY)
	$(RUN) -m mage_core.training --dataset $(DATASET) --preset $(PRESET)

test: $(READY)
	$(RUN) -m pytest --nbval

lab: $(READY)
	$(FAST) $(RUN) -m jupyterlab --notebook-dir=notebooks

bench: $(READY)
	$(RUN) -m mage_core.bench

notebooks: PRESET ?= smoke
notebooks: $(NOTEBOOKS:notebooks/%=out/%)

out/%.ipynb: notebooks/%.ipynb $(READY) always
	mkdir -p out
	$(FAST) $(RUN) -m papermill --cwd notebooks --kernel python3 -p preset $(PRESET) $< $@

figures: $(READY)
	$(RUN) -m mage_core.display

environment: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Python 3.11 or newer is needed: name one with "make PYTHON=python3.12 ..."' >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --requirement requirements.lock
	$(RUN) -m pip install --no-deps --no-build-isolation --editable .
	touch $@

clean:
	rm -rf .venv out build *.egg-info .pytest_cache .hypothesis
	find mage_core tests notebooks -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -exec rm -rf {} +
