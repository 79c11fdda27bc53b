VENV := .venv
PIP := $(VENV)/bin/python -m pip install --quiet -c constraints.txt

.PHONY: demo test check docs clean

demo: $(VENV)/demo.stamp
	$(VENV)/bin/fmm-distill --recipe digits

test: $(VENV)/test.stamp
	$(VENV)/bin/python -m pytest

check: $(VENV)/dev.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

docs: $(VENV)/dev.stamp
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) site build dist

# torch comes first: with it there, no later package asks for another build of it.
$(VENV)/torch.stamp: constraints.txt
	test -x $(VENV)/bin/python || python3 -m venv $(VENV)
	$(PIP) torch==2.13.0
	touch $@

$(VENV)/demo.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) -e .
	touch $@

$(VENV)/test.stamp: $(VENV)/demo.stamp
	$(PIP) -e .[test]
	touch $@

$(VENV)/dev.stamp: $(VENV)/test.stamp
	$(PIP) -e .[dev]
	touch $@
