# make demo   everything on the drawn world, then the result tables        make test   export check, notebooks, pytest
# make lab    JupyterLab                make photos DIR=folder             a report on your own photos
# make album DIR=folder [OTHER=folder] [BENCH=folder] [V1=share] [NOISE=share]   every stage on your labelled photos
# make play   ask, tune, ask why, in JupyterLab: on the newest run, or with DIR=folder on your own photos
# make runs   what lies in runs/        make report                        refresh reports/ from the runs, README.md, RESULTS.md
# make check  export, layout, outputs, README: under a minute              make fix   what `make check` can mend by itself
# make bench [ONLY=family]              make readme                        README.md and RESULTS.md from nbs/ and reports/
# make environment FAISS=cpu   installs faiss-cpu in the place of faiss-gpu (CONTRIBUTING.md)
# make test-slurm   a small Slurm on this machine, the whole graph through it
# PROFILE=mini|midi|gld   SEEDS="1 2 3"   BEGIN=v1|official|imagenet, what gld begins with
# VENV=folder shares one environment (about 8 GB) between clones

SHELL   := bash
OK_PYTHON := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON  ?= $(shell for p in python3.11 python3.12 python3.13 python3; do command -v $$p >/dev/null && $$p -c '$(OK_PYTHON)' 2>/dev/null && echo $$p && break; done)
VENV    ?= .venv
PROFILE ?= mini
SEEDS   ?= 1
CORES   ?= all
V1      ?= 0.4
NOISE   ?= 0
GIVEN   := $(if $(BEGIN),begin=$(BEGIN))
JOBS    ?= $(shell nproc 2>/dev/null || echo 2)
# folders may have spaces in their names: every recipe quotes them, and no target carries one
BIN     := $(if $(filter /%,$(VENV)),$(VENV),$(CURDIR)/$(VENV))/bin
FAISS   ?= $(shell ls -d "$(BIN)"/../lib/python3*/site-packages/faiss_cpu-* >/dev/null 2>&1 && echo cpu || echo gpu)
NEEDS   := $(shell cat settings.ini constraints.txt setup.py pyproject.toml | cksum | cut -d' ' -f1)
MADE    := $(BIN)/../.landmark-$(NEEDS)
export PATH := $(BIN):$(PATH)
export PYTHONPATH := $(CURDIR)

.PHONY: demo test test-slurm check fix lab photos album play runs report readme bench clean setup environment export
.DEFAULT_GOAL := demo

setup:
	@test -e "$(MADE)" || $(MAKE) --no-print-directory environment
	@git config merge.regen.driver true 2>/dev/null || true   # generated files: keep ours, `make export` writes them anew

environment:
	@test -n "$(PYTHON)" || { echo "landmark needs Python 3.11 or newer with venv (on Debian: apt install python3-venv)"; exit 1; }
	@test "$(FAISS)" = gpu || test "$(FAISS)" = cpu || { echo "FAISS is '$(FAISS)'; allowed are gpu and cpu"; exit 2; }
	@test -x "$(BIN)/python" || { echo "making a virtual environment in $(VENV) with $(PYTHON)"; $(PYTHON) -m venv "$(VENV)"; }
	@echo "installing the pinned packages into $(VENV): about 8 GB, a few minutes, once"
	@"$(BIN)/python" -m pip uninstall --quiet --yes faiss-$(if $(filter cpu,$(FAISS)),gpu,cpu) 2>/dev/null   # one module, two packages
	FAISS=$(FAISS) "$(BIN)/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@rm -f "$(BIN)"/../.landmark-*; touch "$(MADE)"

demo: setup
	@"$(BIN)/snakemake" --cores $(CORES) --nolock --rerun-incomplete --rerun-triggers mtime --config profile=$(PROFILE) "seeds=$(SEEDS)" $(GIVEN)
	@"$(BIN)/landmark_graph" done $(PROFILE) $(GIVEN) $(SEEDS)

lab: setup
	"$(BIN)/jupyter" lab nbs

photos: setup
	@test -n "$(DIR)" || { echo 'make photos DIR=folder [QUERY=photo.jpg] [WEIGHTS=folder of a model, hf:owner/name or pretrained:name]'; exit 2; }
	@"$(BIN)/landmark_explore" "$(DIR)" $(if $(QUERY),"$(QUERY)") $(if $(WEIGHTS),-p weights "$(WEIGHTS)")

album: setup
	@test -n "$(DIR)" || { echo 'make album DIR=folder [OTHER=folder] [BENCH=folder] [V1=share or folder] [NOISE=share] [SEEDS="1 2 3"] [KEEP=1]'; exit 2; }
	@"$(BIN)/landmark_album" "$(DIR)" --others "$(OTHER)" --bench "$(BENCH)" --v1 "$(V1)" --noise "$(NOISE)" --seeds $(SEEDS) --cores $(CORES) $(if $(KEEP),--keep)

play: setup
	@"$(BIN)/python" -c "from landmark.play import main; main()" $(if $(DIR),"$(DIR)")

runs: setup
	@"$(BIN)/landmark_graph" runs

# exported code in step with the notebooks, then the notebooks, then the tests: pytest's summary closes the log
test: export LANDMARK_WORLD := tiny
test: export OMP_NUM_THREADS := 1
test: setup
	@echo "== check: export, layout, outputs, README"
	@"$(BIN)/python" tests/check.py
	@echo "== notebooks"
	@"$(BIN)/nbdev_test" --n_workers $(JOBS) --pause 0.1
	@echo "== tests"
	@"$(BIN)/python" -m pytest -n $(JOBS) --dist loadfile

# installed where that is possible; the test skips with a sentence where it is not
test-slurm: export LANDMARK_TEST_SLURM := 1
test-slurm: setup
	@PATH=$$PATH:/usr/sbin; for p in munged slurmctld slurmd squeue; do command -v $$p >/dev/null && continue; \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null || break; echo "installing Slurm and munge from the system's packages"; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge >/dev/null; break; done
	@"$(BIN)/python" -m pytest -rs tests/test_slurm.py

check: setup
	@"$(BIN)/python" tests/check.py

fix: setup
	@"$(BIN)/python" tests/check.py --fix

report: setup
	@"$(BIN)/landmark_report" $(PROFILE) $(GIVEN) $(SEEDS)
	@"$(BIN)/landmark_report" readme

bench: setup
	@"$(BIN)/landmark_bench" $(if $(ONLY),--only $(ONLY)) $(if $(DEVICE),--device $(DEVICE))

readme: setup
	@"$(BIN)/landmark_report" readme

export: setup
	@"$(BIN)/nbdev_export"

clean:
	rm -rf runs .snakemake
