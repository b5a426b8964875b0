# Two commands matter: `make demo` (the whole way once) and `make test` (everything that must hold).
# Both build the environment first, in the project's own .venv; nothing is installed anywhere else.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export LLAMA_NB_CACHE ?= $(CURDIR)/.cache
export LLAMA_NB_TEST_DATA ?= $(if $(wildcard ../shared/data),$(abspath ../shared),)
export TOKENIZERS_PARALLELISM = false
export HF_HUB_OFFLINE = 1
export HF_EVALUATE_OFFLINE = 1
export WANDB_MODE = offline
export MPLBACKEND ?= agg

.PHONY: help setup demo lab test test-slow versions notebooks export readme docs bench clean
help: ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# torch comes first and exactly: any other request may bring a build of several gigabytes
$(VENV)/.ready: settings.ini constraints.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,data]'
	$(BIN)/python -m pip check
	@touch $@

setup: $(VENV)/.ready ## the environment: .venv with pinned versions
	@$(BIN)/python -c "from llama_nb.sources import demo_model; demo_model()"

demo: setup ## fine-tune a real chat model on the shipped conversations: plan, masks, training, before and after
	@$(BIN)/llama-nb demo

lab: setup ## the notebooks in JupyterLab, beginning with the first tutorial
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,data,notebooks]'
	@env -u MPLBACKEND $(BIN)/jupyter lab nbs/tutorials/01_quick.ipynb # a kernel draws into the notebook

test: setup ## every check: notebooks as written and against the modules, then tests/
	@$(BIN)/python tools/check.py

test-slow: setup ## the same, with the cells and tests marked slow
	@$(BIN)/python tools/check.py --flags slow

versions: ## the package as a user installs it, with the oldest, the locked and the newest versions of what it needs
	@for kind in oldest locked newest; do $(PYTHON) tools/versions.py $$kind || exit 1; done

notebooks: setup ## run every notebook and keep its outputs: chapters, home page, docs and tutorials
	@OMP_NUM_THREADS=1 $(BIN)/python tools/nbsave.py nbs/*.ipynb nbs/docs/*.ipynb nbs/tutorials/*.ipynb
	@$(BIN)/python tools/readme.py

export: setup ## notebooks to modules, then strip what git should not see
	@$(BIN)/nbdev_export && $(BIN)/nbdev_clean
	@$(BIN)/python tools/versions.py table

readme: setup ## README.md from nbs/index.ipynb
	@$(BIN)/python tools/readme.py

docs: setup ## the documentation site in _docs/
	@$(BIN)/python tools/docs.py

bench: setup ## the CPU benchmark beside TRL; results in bench/results/
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,data]' trl
	@$(BIN)/python -m bench cpu

clean: ## remove what was built (the environment and the model cache stay)
	rm -rf _docs _proc build dist *.egg-info .pytest_cache
