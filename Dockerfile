# syntax=docker/dockerfile:1.7
# Where builds run in containers and pods: this project, and SGLang in a virtual environment of its own.
#
#   docker build --tag specbundle:0.1.0 .
#
# Layers are ordered by how seldom they change: an edit of the code copies a few MB and installs nothing again.

# `devel`, for its compiler: SGLang builds kernels for the GPU that it meets. 13.0 is what torch of constraints/gpu.txt has.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

# Compilers for kernels, and Python's headers, which Triton compiles its launchers against. Ubuntu keeps no old versions to pin.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# A number, because Kubernetes cannot tell from a name that it is not root. The folders give new volumes their owner.
RUN useradd --uid 10001 --user-group --create-home specbundle \
    && install --directory --owner=specbundle --group=specbundle /data /tmp/specbundle-devices-10001

# The server pins its own torch and transformers.
ARG SGLANG_VERSION=0.5.14
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/sglang \
    && /opt/sglang/bin/python -m pip install "sglang==${SGLANG_VERSION}"

# What the project needs, without the project.
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY constraints/gpu.txt constraints/
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/specbundle \
    && /opt/specbundle/bin/python -m pip install --constraint constraints/gpu.txt "setuptools>=77" '.[gpu,s3]' \
    && /opt/specbundle/bin/python -m pip uninstall --yes specbundle

COPY bundle_manifest.yaml prefect.yaml ./
COPY flows flows
COPY tasks tasks
COPY specforge_core specforge_core
RUN /opt/specbundle/bin/python -m pip install --no-deps --no-build-isolation --editable .

ENV PATH=/opt/specbundle/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    SPECBUNDLE_SGLANG_PYTHON=/opt/sglang/bin/python \
    HF_HOME=/data/huggingface
USER 10001
VOLUME /data
CMD ["specbundle", "--help"]
