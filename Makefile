# The two commands of the README. Each sets itself up from nothing and is quick the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SERVER := $(VENV)/triton-server
SERVER_READY := $(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),$(SERVER)/.ready)
SOURCES := $(wildcard exporter/*.py exporter/*/*.py exporter/tiny/*/* exporter/tuned/* plugins/*.py engines/*.py engines/*/*.py)

.PHONY: demo test test-slow lint clean

demo: out/tiny-keep-10/manifest.json out/tiny-unpruned/manifest.json
	@$(BIN)/python tools/demo.py out/tiny-unpruned out/tiny-keep-10

test: lint $(SERVER_READY)
	$(BIN)/python -m pytest -q

test-slow: $(READY) $(SERVER_READY)
	$(BIN)/python -m pytest -q -m slow

# mypy checks the package as it is installed: rooms are mapped to vflow.* only there.
lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/installed
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target build/installed .
	MYPYPATH=build/installed $(BIN)/mypy

out/tiny-keep-10/manifest.json: $(READY) $(SOURCES)
	@$(BIN)/vflow-export build --model tiny --keep 0.1 --output $(@D) --force

out/tiny-unpruned/manifest.json: $(READY) $(SOURCES)
	@$(BIN)/vflow-export build --model tiny --output $(@D) --force

# torch first and pinned, so that nothing pulls another build of it.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# Triton Inference Server from a wheel, which only the tests use. An environment of its own: its Python backend was built before NumPy 2.
$(SERVER)/.ready: pyproject.toml constraints.txt | $(READY)
	test -x $(SERVER)/bin/python || $(PYTHON) -m venv $(SERVER)
	sed 's/^numpy==.*/numpy<2/' constraints.txt > $(SERVER)/constraints.txt
	$(SERVER)/bin/python -m pip install --quiet --constraint $(SERVER)/constraints.txt --editable '.[triton-server]'
	@touch $@

clean:
	rm -rf out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
