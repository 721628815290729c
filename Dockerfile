# The recipe in a container, as a cluster runs it:
#   docker build -t open_rm .
#   docker run --gpus all --ipc host -v $PWD/output:/workspace/open_rm/output open_rm \
#       bash scripts/train/debug/reward_modeling.sh
# Without a GPU, a plain Python base works too: --build-arg BASE_IMAGE=python:3.11-slim-bookworm
ARG BASE_IMAGE=nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04
FROM ${BASE_IMAGE}

# gcc (with g++) and Python's headers: Triton compiles what launches its kernels at the first forward on a GPU. DeepSpeed
# compiles nothing at a start; g++, make and ninja are for its offload to NVMe.
# libibverbs1 and its drivers, librdmacm1 (librdmacm1t64 provides it in Ubuntu 24.04): NCCL opens libibverbs.so.1 when it
# starts, and without it takes TCP between nodes, on InfiniBand too, and says so only with NCCL_DEBUG=INFO.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        ca-certificates g++ gcc git ibverbs-providers libibverbs1 librdmacm1 make ninja-build \
        python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --shell /bin/bash trainer
WORKDIR /workspace/open_rm
RUN chown trainer:trainer /workspace/open_rm
USER trainer

# Requirements first: changing the code does not install them again.
COPY --chown=trainer:trainer requirements.txt ./
RUN python3 -m venv .venv \
    && .venv/bin/pip install --no-cache-dir "$(grep -o '^torch==[^ ]*' requirements.txt)" \
    && .venv/bin/pip install --no-cache-dir -r requirements.txt
COPY --chown=trainer:trainer . .

ENV PATH=/workspace/open_rm/.venv/bin:${PATH} PYTHONUNBUFFERED=1
CMD ["bash", "scripts/train/debug/reward_modeling.sh"]
