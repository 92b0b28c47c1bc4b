# Two commands on a fresh machine: `make demo` and `make test`. Needs Python 3.11, 3.12 or 3.13 and make.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$python && break; \
	done)
VENV := .venv

.PHONY: install demo test lint clean

install: $(VENV)/.installed

# torch is installed first and alone, so that no other package chooses its build. editable_mode=compat: otherwise a folder
# named mvhpc where Python starts, as the clone in its parent, hides the package.
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed; set it: make PYTHON=/path/to/python3.12"; exit 1; }
	@echo "1/3 environment in $(VENV)"
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --upgrade pip
	@echo "2/3 torch (200 MB and more)"
	@$(VENV)/bin/python -m pip install --quiet torch==2.13.0
	@echo "3/3 mvhpc and its packages (about 150; one to three minutes)"
	@PYTHONWARNINGS=ignore $(VENV)/bin/python -m pip install --quiet -c constraints.txt \
		--config-settings editable_mode=compat -e '.[dev]'
	@touch $@

demo: install
	@$(VENV)/bin/mvhpc run --config demo

# Two processes run the tests, file by file.
test: install
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf build *.egg-info .mypy_cache .ruff_cache .pytest_cache
