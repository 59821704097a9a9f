# make demo   a digital twin, the whole chain, its accuracy, and napari where there is a display
# make test   every test (viewer tests under Xvfb)
#
# make demo VIEW=no, or ARGS=--no-view   never open napari
# make demo PRESET=tiny                  a twin of 64 pixels instead of 256
# make ... PYTHON=/path/to/python3.12    choose the Python (>= 3.11) that .venv is made from

VENV ?= .venv
PRESET ?= demo
VIEW ?= yes
ARGS ?=
PYTHON ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup system demo test lint clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile

setup: $(STAMP) system

system:
	@tools/system-libraries.sh

$(STAMP): pyproject.toml tools/make-venv.sh
	@tools/make-venv.sh "$(VENV)" "$(PYTHON)"
	@touch $@

demo: setup
	@PYTHON="$(BIN)/python" tools/demo.sh --preset "$(PRESET)" $(if $(filter no 0 false,$(VIEW)),--no-view) $(ARGS)

test: setup
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder $(ARGS)

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --strict src
	$(BIN)/lint-imports --no-logo
	$(BIN)/npe2 validate src/napari_xanes_tomo/napari.yaml

clean:
	rm -rf $(VENV) dist build site demo demo-out demo-tiny demo-tiny-out
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find src tests benchmarks -name __pycache__ -type d -exec rm -rf {} +
