# make demo: from a fresh clone to results on a rendered sample.  make test: every test.  make lint: ruff.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
DATA_PATH ?= sample_data
DEMO := --data-path $(DATA_PATH) --category all --sampling-ratio all --backbone efficientnet_lite0

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(RUN) prepare_data.py sample sample_data
	$(RUN) train.py $(DEMO)
	$(RUN) evaluation.py $(DEMO)

test: $(VENV)/installed-dev
	$(RUN) -m pytest -q

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: requirements.txt | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
