# Two commands do everything: `make demo` and `make test`. Both create the environment (.venv) and build first.
SHELL := /bin/bash
.DEFAULT_GOAL := build

VENV ?= .venv
TORCH ?= torch==2.14.1 torchvision==0.29.1
PY := $(VENV)/bin/python
BUILD ?= build
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q --timeout=600
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

# Installs a package of Debian's, when root, unless the command succeeds.
needs = $(1) > /dev/null 2>&1 || { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq $(2) > /dev/null; } || { echo "this needs $(2): apt-get install $(2)"; exit 1; }

.PHONY: env build demo tiny test test-cpp test-python test-processes test-long test-min-torch lint format golden-update benchmark zoo clean

env: $(VENV)/.ready
$(VENV)/.ready: requirements-dev.txt
	@$(call needs,python3 -c 'import ensurepip',python3-venv)
	@$(call needs,test -e "$$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h",python3-dev)
	@test -x $(PY) || python3 -m venv $(VENV)
	@$(PY) -m pip install --quiet $(TORCH)
	@$(PY) -m pip install --quiet -r requirements-dev.txt
	@echo "$(CURDIR)" > "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch_soap_checkout.pth"  # scripts anywhere import this checkout
	@touch $@

# Ninja decides what is out of date; nothing to do takes under a second.
build: env
	@$(PY) tools/build.py --build-dir $(BUILD)

demo: build
	$(PY) examples/demo.py

tiny: build
	$(PYTEST) tests/tiny

test: lint test-cpp test-python

test-python: build
	@[ "$$(id -u)" != 0 ] || { $(call needs,command -v ip,iproute2); }  # hosts as network namespaces; not root: that test is skipped
	@[ "$$(id -u)" != 0 ] || { $(call needs,command -v chromium,chromium); }  # looks at the report; not root and none there: that test is skipped
	$(PYTEST) tests/tiny tests/unit tests/golden tests/lint tests/property tests/dist

test-cpp: env
	@$(call needs,dpkg -s libgtest-dev,libgtest-dev)
	@$(PY) tools/build.py --build-dir build-tests --tests
	build-tests/soap_tests --gtest_brief=1

test-processes: build
	$(PY) tests/dist/sweep.py

test-long: build
	OMP_NUM_THREADS=1 $(PY) -m pytest -q tests/property --cases 10000

# The oldest torch that we support: build and the tiny suite, in an environment of its own.
test-min-torch:
	$(MAKE) env VENV=.venv-min TORCH=torch==2.13.0
	SOAP_BUILD_DIR=build-min .venv-min/bin/python -m pip install --quiet --no-build-isolation --no-deps --upgrade --target build-min/site .
	PYTHONPATH=build-min/site:. OMP_NUM_THREADS=1 .venv-min/bin/pytest -q --timeout=600 tests/tiny

lint: build
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $$(git ls-files '*.cpp' '*.h')
	$(PY) -m mypy torch_soap
	$(PYTEST) tests/lint

format:
	$(VENV)/bin/ruff check --fix-only .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $$(git ls-files '*.cpp' '*.h')

golden-update: build
	SOAP_GOLDEN_UPDATE=1 $(PYTEST) tests/golden

benchmark: build
	$(PYTEST) benchmarks -s

# Hundreds of real models, hours on a small machine; MODELS="hf/* timm/resnet*" for some.
zoo: build
	$(MAKE) env VENV=.venv-zoo
	.venv-zoo/bin/python -m pip install --quiet timm transformers
	OMP_NUM_THREADS=1 .venv-zoo/bin/python -m benchmarks.zoo $(foreach m,$(MODELS),'$(m)')

clean:
	rm -rf build build-tests build-min out torch_soap/*.so
