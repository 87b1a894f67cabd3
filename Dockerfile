# syntax=docker/dockerfile:1
# Two images from one file; both run as user 10001 and need no write access outside /tmp:
#   docker build --target cpu  -t latentd .
#   docker build --target cuda -t latentd:cuda .      (GPU: `docker run --gpus all ...`)
# For a build that can be repeated bit by bit, pin the base by digest: --build-arg PYTHON_IMAGE=python:3.12-...@sha256:...
ARG PYTHON_IMAGE=python:3.12-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/latentd/bin:$PATH
WORKDIR /src
# For the CPU kernels; the images that run have no compiler.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/latentd
COPY constraints.txt pyproject.toml ./

# Layers by how often they change: torch, the other dependencies, our code.
FROM build AS build-cpu
RUN pip install --extra-index-url https://download.pytorch.org/whl/cpu -c constraints.txt torch
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > requirements.txt \
    && pip install -c constraints.txt -r requirements.txt
COPY . .
RUN pip install --no-deps .

# PyPI's torch brings CUDA's libraries as packages: no CUDA base image is needed.
FROM build AS build-cuda
RUN pip install -c constraints.txt torch
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > requirements.txt \
    && pip install -c constraints.txt -r requirements.txt
COPY . .
RUN pip install --no-deps .

FROM ${PYTHON_IMAGE} AS runtime
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="latentd" \
      org.opencontainers.image.description="Serves DeepSeek-V2-family models over the OpenAI HTTP API" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN groupadd --gid 10001 latentd \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin latentd
ENV PATH=/opt/latentd/bin:$PATH HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /tmp
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# Not ready is unhealthy; loading a large checkpoint may take the ten minutes of the start period.
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 CMD ["python", "-m", "server.healthcheck"]
ENTRYPOINT ["latentd"]
CMD ["serve", "--host", "0.0.0.0"]

FROM runtime AS cuda
COPY --from=build-cuda /opt/latentd /opt/latentd

FROM runtime AS cpu
COPY --from=build-cpu /opt/latentd /opt/latentd
