# Everything a person or a CI runs. `make help` lists the targets.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PORT   ?= 8000
HOST   ?= 127.0.0.1
STAMP  := $(VENV)/.installed
# Never fetch an interpreter from the network: the one that was named is the one that is used.
export UV_PYTHON_DOWNLOADS = never

.DEFAULT_GOAL := help
.PHONY: help install run test conformance torture prove-rotation soak check format bench migrate lock clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

# uv installs in a second; where it cannot be had, pip installs the same hashed files.
$(STAMP): pyproject.toml requirements/dev.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/uv || $(BIN)/python -m pip install -q uv || echo "uv is not to be had here, pip takes over"
	@if test -x $(BIN)/uv; then \
	  $(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python --require-hashes -r requirements/dev.txt && \
	  $(BIN)/uv pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e .; \
	else \
	  $(BIN)/python -m pip install -q --require-hashes -r requirements/dev.txt && \
	  $(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .; \
	fi
	@touch $@

install: $(STAMP) ## Make .venv with everything in it

run: $(STAMP) ## Serve on this machine with SQLite and a demo user (PORT=9000 to change the port)
	@exec $(BIN)/identity-service dev --host $(HOST) --port $(PORT)

test: $(STAMP) ## Run the whole suite against real PostgreSQL and Redis (found or brought)
	$(BIN)/python -m pytest -n 2 --dist loadgroup

conformance: $(STAMP) ## Run what proves a section of an RFC, and write docs/conformance.md
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m rfc --conformance

torture: $(STAMP) ## Write docs/torture.json: forged and borderline tokens to try any verifier on
	$(BIN)/python -m tests.contracts.torture

prove-rotation: $(STAMP) ## Prove on two replicas, under load and with kills, that key rotation never hurts
	$(BIN)/python -m tests.rotation

soak: $(STAMP) ## Load two replicas for ten minutes while one thing after the other breaks (MINUTES=60, SEED=7)
	$(BIN)/python -m tests.soak $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED))

check: $(STAMP) ## Lint, format, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## Rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## Measure speed and memory against this machine's own RSA speed
	$(BIN)/python -m bench

migrate: $(STAMP) ## Bring the schema up to date: of IDENTITY_DATABASE_URL, or of this machine's SQLite
	$(BIN)/identity-service migrate $(if $(IDENTITY_DATABASE_URL),,--data-dir .data)

lock: $(STAMP) ## Compile requirements/*.txt anew from pyproject.toml
	$(BIN)/uv pip compile -q pyproject.toml --extra server --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --upgrade -o requirements/server.txt
	$(BIN)/uv pip compile -q pyproject.toml --extra server --group dev --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --upgrade -o requirements/dev.txt

clean: ## Remove what make made, but neither data nor keys
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
