# The server and its commands; nothing that builds or tests them.
#
# A release names the base by its digest: --build-arg PYTHON_IMAGE=docker.io/library/python:3.13-slim-bookworm@sha256:…
ARG PYTHON_IMAGE=docker.io/library/python:3.13-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# What a build leaves behind can be told by it: podman image prune --filter label=org.opencontainers.image.title=…
LABEL org.opencontainers.image.title="identity-service-build"
WORKDIR /build
# Wheels only, each with a hash that is on record: nothing is compiled here, and nothing unknown is run.
COPY requirements/server.txt requirements/build.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv --without-pip /app/venv \
 && python -m venv --without-pip tools \
 && python -m pip --python /app/venv install --no-compile --no-deps --only-binary=:all: --require-hashes -r server.txt \
 && python -m pip --python tools install --no-compile --no-deps --only-binary=:all: --require-hashes -r build.txt
WORKDIR /build/source
COPY LICENSE README.md pyproject.toml ./
COPY identity_service identity_service
COPY migrations migrations
RUN ../tools/bin/python -m hatchling build -t wheel -d ../dist \
 && python -m pip --python /app/venv install --no-compile --no-deps --no-index --find-links ../dist identity-service \
 && find /app/venv/bin -type f ! -name identity-service -delete \
 && find /app/venv -depth \( -name tests -o -path '*/venv/include' -o -name .gitignore \) -exec rm -r {} +

FROM ${PYTHON_IMAGE}
ENV PATH=/app/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# What is in here can neither gain rights nor install anything. The account has a name, because libraries look it up.
RUN echo 'identity:x:10001:' >> /etc/group \
 && echo 'identity:x:10001:10001::/app:/usr/sbin/nologin' >> /etc/passwd \
 && find / -xdev -path '*/python3*' \( -name ensurepip -o -name pip -o -name 'pip-*.dist-info' \) -prune -exec rm -r {} + \
 && rm -f /usr/local/bin/pip* \
 && find / -xdev -type f -perm /6000 -exec chmod ug-s {} +
WORKDIR /app
COPY --from=build /app/venv /app/venv
# No process can write bytecode here, so it is made now, for what a server imports (a start takes half the time). It
# names its source by a hash, not by a time, and the names are sorted: two builds give the same bytes.
RUN python -c 'import sys, identity_service.cli, alembic.command, argon2, uvicorn.lifespan.on, uvloop; \
               files = (str(getattr(module, "__file__", None)) for module in sys.modules.values()); \
               print(*sorted(file for file in files if file.endswith(".py")), sep="\n")' > /tmp/imported \
 && PYTHONHASHSEED=0 python -m compileall -q --invalidation-mode checked-hash -i /tmp/imported \
    "$(python -c 'import identity_service; print(*identity_service.__path__)')" \
 && rm /tmp/imported
# Development is for who asks for it. The ports can be reached from outside the container, where they are published.
ENV IDENTITY_ENVIRONMENT=production \
    IDENTITY_HOST=0.0.0.0 \
    IDENTITY_PORT=8000 \
    IDENTITY_MANAGEMENT_HOST=0.0.0.0 \
    IDENTITY_MANAGEMENT_PORT=9000
EXPOSE 8000 9000
USER 10001:10001
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s CMD ["python", "-c", "import os, sys; from http.client import HTTPConnection; probe = HTTPConnection('127.0.0.1', int(os.environ['IDENTITY_MANAGEMENT_PORT']), timeout=2); probe.request('GET', '/healthz'); sys.exit(probe.getresponse().status != 200)"]
ENTRYPOINT ["/app/venv/bin/identity-service"]
CMD ["serve"]
# `make image` adds the commit, as org.opencontainers.image.revision.
LABEL org.opencontainers.image.title="identity-service" \
      org.opencontainers.image.description="OAuth 2.0 and OpenID Connect token service" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0"
