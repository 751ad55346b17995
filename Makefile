# make train   environment, embedded data set, five stages, evaluation, report
# make test    the tests
# make check   style
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
ARGS ?=

# Byte code is kept even where the environment says not to: without it every process compiles torch anew, 8 of 17 s.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: train test check env dashboard

train: env
	$(RUN) train.py $(ARGS)

test: env
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadgroup $(ARGS)

check: env
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

env: $(VENV)/.ready

$(VENV)/.ready: requirements.lock
	@echo "making the environment (.venv) from requirements.lock"
	@$(PYTHON) -c "import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else 'error: Python 3.11 to 3.13 is needed, this is %d.%d; use make PYTHON=python3.11' % sys.version_info[:2])"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check uv
	@$(VENV)/bin/uv pip sync --quiet --python $(RUN) requirements.lock
	@touch $@

# PORT=... for another port; FASTVLM_RUNS where the runs are, if not in runs/.
PORT ?= 5000
dashboard: env
	@echo "http://127.0.0.1:$(PORT)"
	@MLFLOW_DISABLE_TELEMETRY=true $(VENV)/bin/mlflow server --host 127.0.0.1 --port $(PORT) \
		--backend-store-uri "sqlite:///$${FASTVLM_RUNS:-runs}/mlflow.db"
