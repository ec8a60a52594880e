# make demo   train, evaluate, sample and report a small hybrid model in runs/demo (a few minutes on two CPU cores)
# make golf   train golf-27m (ten minutes of one H100), quantise it for a file of 16,000,000 bytes, and score the file, in
#             runs/golf; another recipe, overrides and size: make golf RECIPE=recipes/demo.yaml SET=train.steps=50 BYTES=1500000
# make test   lint and test
# make graph  redraw docs/images/import-graph.png
# make docs   build docs/ as a site, in site/index.html
# Each sets up .venv first when it is missing or older than the requirements; another interpreter: make demo PYTHON=python3.12

PYTHON = python3

RECIPE = recipes/golf-27m.yaml
# Steps of ten minutes on one H100, with the weight decay of recipes/experiments/golf-ten-minutes.yaml.
SET_recipes/golf-27m.yaml = train.steps=4600 train.optimizer.matrix.weight_decay=0.5
SET = $(SET_$(RECIPE))
BYTES = 16000000
OUT = runs/golf

.PHONY: demo golf test graph docs

# An interrupted demo resumes from its last checkpoint; a finished one is evaluated and reported again.
demo: .venv/installed
	.venv/bin/fusedlm train recipes/demo.yaml --out runs/demo --resume
	.venv/bin/fusedlm eval runs/demo
	.venv/bin/fusedlm report runs/demo

# An interrupted training resumes from its last checkpoint.
golf: .venv/installed
	.venv/bin/fusedlm golf $(RECIPE) $(SET) --bytes $(BYTES) --out $(OUT)

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
