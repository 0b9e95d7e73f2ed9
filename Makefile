# make demo   everything on the drawn world, then the result tables        make test   export check, notebooks, pytest
# make lab    JupyterLab                make photos DIR=folder             a report on your own photos
# make runs   what lies in runs/        make report                        refresh reports/ from the runs and README.md
# make bench [ONLY=family]              make readme                        README.md from nbs/index.ipynb
# PROFILE=mini|midi|gld   SEEDS="1 2 3"   VENV=folder shares one environment (about 8 GB) between clones

SHELL   := bash
PYTHON  ?= $(firstword $(foreach p,python3.12 python3.11 python3.13 python3,$(shell command -v $(p) >/dev/null 2>&1 && $(p) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $(p))))
VENV    ?= .venv
PROFILE ?= mini
SEEDS   ?= 1
CORES   ?= all
BIN     := $(abspath $(VENV))/bin
STAMP   := $(VENV)/.landmark-$(shell cat settings.ini constraints.txt setup.py pyproject.toml | cksum | cut -d' ' -f1)
HERE    := $(VENV)/.at-$(shell pwd | cksum | cut -d' ' -f1)
export PATH := $(BIN):$(PATH)
export PYTHONPATH := $(CURDIR)

.PHONY: demo test lab photos runs report readme bench clean setup export
.DEFAULT_GOAL := demo

setup: $(STAMP)
$(STAMP):
	@test -n "$(PYTHON)" || { echo "landmark needs Python 3.11 or newer with venv (on Debian: apt install python3-venv)"; exit 1; }
	@test -x $(BIN)/python || { echo "making a virtual environment in $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing the pinned packages into $(VENV): about 8 GB, a few minutes, once"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@rm -f $(VENV)/.landmark-*; touch $@

demo: setup
	@$(BIN)/snakemake --cores $(CORES) --nolock --rerun-incomplete --rerun-triggers mtime --quiet rules --config profile=$(PROFILE) seeds="$(subst $() ,$(comma),$(strip $(SEEDS)))"
	@$(BIN)/landmark_graph done $(PROFILE) $(SEEDS)
comma := ,

lab: setup
	$(BIN)/jupyter lab nbs

runs: setup
	@$(BIN)/landmark_graph runs

test: setup
	@tools/test

report: setup
	@$(BIN)/python tools/report.py $(PROFILE) $(SEEDS)
	@$(MAKE) --no-print-directory readme

readme: setup
	@$(BIN)/python tools/readme.py

export: setup
	@$(BIN)/nbdev_export

clean:
	rm -rf runs .snakemake
