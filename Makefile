# make demo   train, evaluate, sample and report a small hybrid model in runs/demo (a few minutes on two CPU cores)
# make test   lint and test
# make graph  redraw docs/images/import-graph.png
# make docs   build docs/ as a site, in site/index.html
# Each sets up .venv first when it is missing or older than the requirements; another interpreter: make demo PYTHON=python3.12

PYTHON = python3

.PHONY: demo test graph docs

# An interrupted demo resumes from its last checkpoint; a finished one is evaluated and reported again.
demo: .venv/installed
	.venv/bin/fusedlm train recipes/demo.yaml --out runs/demo --resume
	.venv/bin/fusedlm eval runs/demo
	.venv/bin/fusedlm report runs/demo

test: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/python -m pytest -q -n 2 --dist worksteal -rs

graph: .venv/installed
	.venv/bin/python scripts/import_graph.py

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("fusedlm needs Python 3.11 or newer, this is %d.%d; name one with: make PYTHON=python3.12" % sys.version_info[:2])'
	@echo 'Setting up .venv (a minute or two; PyTorch is the large part)'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs,prepare]'
	touch $@
