# `make help` lists what there is. Every target makes its own environment from the locked requirements.

VENV ?= .venv
# The first Python of the machine that is new enough; `make PYTHON=... test` names another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; exit; }; \
	done; echo python3)
BIN := $(VENV)/bin
LOCKS := $(wildcard requirements/*.txt storage/rows/*.[ch]) requirements/install.py pyproject.toml
PYTEST_ARGUMENTS ?=
# Processes that run the tests side by side; 0 runs them all in one.
WORKERS ?= 2
CHECKED := lakebus storage actors serve_app cluster migrations tests

.DEFAULT_GOAL := help
.PHONY: help demo test check format chaos soak fuzz fuzz-json stores postgres simulate mutation bench bench-quick profiles bench-compaction docs lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.runtime ## Start everything, stream real flights in, ask questions, stop again
	$(BIN)/lakebus demo

test: $(VENV)/.dev ## Run every test
	$(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGUMENTS)

check: $(VENV)/.dev ## Lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(CHECKED)

format: $(VENV)/.dev ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

chaos: $(VENV)/.dev ## Kill and pause a running stack: SEED=7 MINUTES=3 PLACEMENT=together|spread|two-nodes
	$(BIN)/python -m tests.chaos $(if $(SEED),--seed $(SEED)) $(if $(MINUTES),--minutes $(MINUTES)) \
		$(if $(PLACEMENT),--placement $(PLACEMENT)) $(CHAOS_ARGUMENTS)

soak: $(VENV)/.dev ## All maintenance jobs at work under kills: SEED=7 MINUTES=30
	$(BIN)/python -m tests.chaos --maintenance --minutes $(or $(MINUTES),30) $(if $(SEED),--seed $(SEED)) \
		--results $(or $(RESULTS),benchmarks/results/soak.json)

fuzz: $(VENV)/.dev ## The service against its own OpenAPI: MINUTES=5 SEED=1
	$(BIN)/python -m tests.openapi --minutes $(or $(MINUTES),5) $(if $(SEED),--seed $(SEED))

fuzz-json: $(VENV)/.dev ## The compiled JSON reader against the exact pass, with sanitizers: MINUTES=5 SEED=1
	$(BIN)/python -m tests.json_reader --minutes $(or $(MINUTES),5) $(if $(SEED),--seed $(SEED))

stores: $(VENV)/.dev ## Hold the object store that the settings name to every promise
	$(BIN)/python -m tests.given_store

# PROGRAMS is a folder with initdb and postgres; DSN a server with a role that may create databases.
# A server by DSN is not killed by the tests; those that kill one need PROGRAMS.
postgres: $(VENV)/.dev ## The promises on another PostgreSQL: DSN=postgresql://… or PROGRAMS=/usr/lib/postgresql/15/bin
	@$(if $(DSN)$(PROGRAMS),,$(error say which: DSN=… or PROGRAMS=…))
	$(if $(DSN),LAKEBUS_TEST_POSTGRES_DSN='$(DSN)') $(if $(PROGRAMS),LAKEBUS_POSTGRES_BIN_DIR='$(PROGRAMS)') \
		$(BIN)/python -m pytest -n $(WORKERS) -rs \
		tests/test_conformance_postgres.py tests/matrix tests/integration/test_postgres_pool.py \
		tests/integration/test_postgres_locks.py tests/integration/test_postgres_outcomes.py \
		tests/integration/test_postgres_versions.py tests/integration/test_migrate.py $(PYTEST_ARGUMENTS)

simulate: $(VENV)/.dev ## Seeded schedules with faults, in memory: SEED=1 MINUTES=1
	$(BIN)/python -m tests.simulation $(if $(SEED),--seed $(SEED)) $(if $(MINUTES),--minutes $(MINUTES))

mutation: $(VENV)/.dev ## Break a copy of the code on purpose; the suite must notice each time
	$(BIN)/python -m tests.mutation $(if $(MUTANTS),$(MUTANTS),--write benchmarks/results)

bench: $(VENV)/.dev $(VENV)-peers/.made ## Goals beside peers: report, tables, plots (two hours)
	$(BIN)/python -m benchmarks.goals --peers $(VENV)-peers/bin/python $(BENCH_ARGUMENTS)

bench-quick: $(VENV)/.dev $(VENV)-peers/.made ## The same in minutes, into benchmarks/results/quick
	$(BIN)/python -m benchmarks.goals --quick --peers $(VENV)-peers/bin/python $(BENCH_ARGUMENTS)

profiles: $(VENV)/.dev ## Flame graphs of a stack at work
	$(BIN)/python -m benchmarks.profiles

bench-compaction: $(VENV)/.dev $(VENV)-peers/.made ## Compaction beside DuckLake and delta-rs
	$(BIN)/python -m benchmarks.compaction --peers $(VENV)-peers/bin/python $(BENCH_ARGUMENTS)

docs: $(VENV)/.runtime ## Write the generated parts of the documentation
	$(BIN)/python -m cluster.generated_docs

clean: ## Remove the environment and caches (never data)
	rm -rf $(VENV) build dist *.egg-info storage/rows/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Locks are made with pip-tools on the oldest Python that is supported.
COMPILE := pip-compile --quiet --generate-hashes --strip-extras --allow-unsafe \
	--no-emit-index-url --no-emit-find-links --no-emit-trusted-host
lock: ## Renew the locked requirements (needs pip-tools)
	cd requirements && for name in build runtime dev peers; do $(COMPILE) -o $$name.txt $$name.in || exit 1; done

$(VENV)/.runtime: $(LOCKS)
	@$(PYTHON) requirements/install.py $(VENV)
	@touch $@

$(VENV)-peers/.made: requirements/peers.txt requirements/install.py
	@$(PYTHON) requirements/install.py $(VENV)-peers --peers
	@touch $@

$(VENV)/.dev: $(LOCKS)
	@$(PYTHON) requirements/install.py $(VENV) --dev
	@touch $(VENV)/.runtime $@
