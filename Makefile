# Everything a person or a CI runs. `make help` lists the targets.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PORT   ?= 8000
HOST   ?= 127.0.0.1
STAMP  := $(VENV)/.installed
AUDIT  := $(VENV)/audit/bin
# Whom `make audit` asks: pypi or osv.
AUDIT_SERVICE ?= pypi
IMAGE  ?= identity-service:dev
REVISION := git describe --always --abbrev=40 --dirty --exclude='*'
# Never fetch an interpreter from the network: the one that was named is the one that is used.
export UV_PYTHON_DOWNLOADS = never

.DEFAULT_GOAL := help
.PHONY: $(shell sed -n 's/^\([a-z-]*\):.*\#\# .*/\1/p' $(MAKEFILE_LIST))

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

tools: $(STAMP) ## Find, or bring without installing, the programs that some tests run
	@$(BIN)/python -m tests.support.tools

test: $(STAMP) tools ## Run the whole suite against real PostgreSQL and Redis (found or brought)
	$(BIN)/python -m pytest -n 2 --dist loadgroup

conformance: $(STAMP) ## Run what proves a section of an RFC, and write docs/conformance.md
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m rfc --conformance

torture: $(STAMP) ## Write docs/torture.json: forged and borderline tokens to try any verifier on
	$(BIN)/python -m tests.contracts.torture

prove-rotation: $(STAMP) ## Prove on two replicas, under load and with kills, that key rotation never hurts
	$(BIN)/python -m tests.rotation

soak: $(STAMP) ## Load two replicas for ten minutes while one thing after the other breaks (MINUTES=60, SEED=7)
	$(BIN)/python -m tests.soak $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED))

check: $(STAMP) ## Lint, format, types, import contracts, licences, bad versions, secrets, workflows
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.supply_chain check
	$(BIN)/zizmor --offline --persona=auditor --no-progress --quiet .github

secrets: $(STAMP) ## Look for keys, tokens and passwords that were left in the tree
	$(BIN)/python -m tests.supply_chain secrets

licences: $(STAMP) ## Write docs/licences.md; fails for a licence that is not allowed
	$(BIN)/python -m tests.supply_chain licences

sbom: $(STAMP) ## Write build/sbom*.cdx.json: what the server is made of, as CycloneDX
	$(BIN)/python -m tests.supply_chain sbom

# In an environment of its own: the auditor's own dependencies are none of ours.
audit: $(STAMP) ## Ask for known vulnerabilities of everything that is locked; needs the network
	@test -x $(AUDIT)/python || $(PYTHON) -m venv $(VENV)/audit
	@if test -x $(BIN)/uv; then \
	  $(BIN)/uv pip install -q --python $(AUDIT)/python --require-hashes -r requirements/audit.txt; \
	else \
	  $(AUDIT)/python -m pip install -q --require-hashes -r requirements/audit.txt; \
	fi
	$(BIN)/python -m tests.supply_chain audit $(AUDIT)/pip-audit --vulnerability-service $(AUDIT_SERVICE)

format: $(STAMP) ## Rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## Measure speed and memory against this machine's own RSA speed
	$(BIN)/python -m bench

# Of one commit podman and buildah make the same image, bit for bit, wherever and whenever they do: every file has one
# time, which is the same for every commit, so that layers that did not change stay as they are.
image: ## Build the image with docker, podman or buildah (PYTHON_IMAGE=…@sha256:… pins its base, IMAGE=… names it)
	@epoch=946684800; \
	set -- $(if $(PYTHON_IMAGE),--build-arg "PYTHON_IMAGE=$(PYTHON_IMAGE)") $(BUILD_FLAGS) --tag "$(IMAGE)" \
	  --label "org.opencontainers.image.revision=$$($(REVISION) 2>/dev/null || echo unknown)"; \
	if docker version >/dev/null 2>&1; then \
	  exec docker build --build-arg "SOURCE_DATE_EPOCH=$$epoch" "$$@" .; \
	elif command -v podman >/dev/null; then exec podman build --timestamp "$$epoch" "$$@" .; \
	elif command -v buildah >/dev/null; then exec buildah bud --layers --timestamp "$$epoch" "$$@" .; \
	else echo "make image needs docker with a daemon that answers, podman, or buildah" >&2; exit 1; fi

image-test: $(STAMP) ## Build the image twice and run it as the rendered manifests say (as root, with podman)
	$(BIN)/python -m tests.deploy.image

migrate: $(STAMP) ## Bring the schema up to date: of IDENTITY_DATABASE_URL, or of this machine's SQLite
	$(BIN)/identity-service migrate $(if $(IDENTITY_DATABASE_URL),,--data-dir .data)

manifests: $(STAMP) ## Render deploy/kubernetes anew; takes kustomize or kubectl
	$(BIN)/python -m tests.deploy.render

lock: $(STAMP) ## Compile requirements/*.txt anew from pyproject.toml
	$(BIN)/uv pip compile -q pyproject.toml --extra server --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --upgrade -o requirements/server.txt
	$(BIN)/uv pip compile -q pyproject.toml --extra server --extra otel --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --upgrade -o requirements/server-otel.txt
	$(BIN)/uv pip compile -q pyproject.toml --extra server --extra otel --group dev --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --upgrade -o requirements/dev.txt
	$(BIN)/uv pip compile -q --group pyproject.toml:build --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --upgrade -o requirements/build.txt
	$(BIN)/uv pip compile -q --group pyproject.toml:audit --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --upgrade -o requirements/audit.txt

clean: ## Remove what make made, but neither data nor keys
	rm -rf $(VENV) .tools dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
