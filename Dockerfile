# The recipe in a container, as a cluster runs it:
#   docker build -t open_rm .
#   docker run --gpus all --ipc host -v $PWD/output:/workspace/open_rm/output open_rm \
#       bash scripts/train/debug/reward_modeling.sh
# Without a GPU, a plain Python base works too: --build-arg BASE_IMAGE=python:3.11-slim-bookworm
ARG BASE_IMAGE=nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04
FROM ${BASE_IMAGE}

# g++ and python headers: DeepSpeed and Triton compile small kernels at the first start.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        ca-certificates g++ git make ninja-build python3 python3-dev python3-venv \
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
