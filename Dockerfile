# The recipe in a container, as a cluster runs it (docs/cluster.md):
#   docker build -t open_rm --build-arg USER_ID=$(id -u) .
#   mkdir -p output && docker run --gpus all --ipc host -v $PWD/output:/workspace/open_rm/output open_rm \
#       bash scripts/train/debug/reward_modeling.sh
# Without a GPU, a plain Debian or Ubuntu with Python 3.11 or newer works too: --build-arg BASE_IMAGE=debian:bookworm-slim
ARG BASE_IMAGE=nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04
FROM ${BASE_IMAGE}
# Who owns what a run writes to a folder of the host's: your number, since the folder is yours.
ARG USER_ID=1000
RUN if [ "${USER_ID}" = 0 ]; then \
        echo "error: USER_ID=0 is root, whom a run must not be; build with another number, and chown it the folders that you mount" >&2; \
        exit 1; \
    fi

# gcc with libc's and Python's headers: Triton compiles what launches its kernels at the first forward on a GPU. DeepSpeed
# compiles nothing at a start.
# libibverbs1 and its drivers, librdmacm1 (librdmacm1t64 provides it in Ubuntu 24.04): NCCL opens libibverbs.so.1 when it
# starts, and without it takes TCP between nodes, on InfiniBand too, and says so only with NCCL_DEBUG=INFO.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        ca-certificates gcc libc6-dev ibverbs-providers libibverbs1 librdmacm1 \
        python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# Requirements first: changing the code does not install them again. Beside the repository, not in it: they stay where you
# mount a repository of yours over it.
COPY requirements.txt /opt/requirements.txt
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir "$(grep -o '^torch==[^ ]*' /opt/requirements.txt)" \
    && /opt/venv/bin/pip install --no-cache-dir -r /opt/requirements.txt
ENV PATH=/opt/venv/bin:${PATH} PYTHONUNBUFFERED=1

# Who has the number in the base goes: Ubuntu's image has a user 1000.
# A volume that is mounted over one of these folders for the first time becomes the user's, as the folder is.
RUN other=$(getent passwd ${USER_ID} | cut -d: -f1) && if [ -n "$other" ]; then userdel --remove "$other"; fi \
    && useradd --uid ${USER_ID} --create-home --shell /bin/bash trainer \
    && cd /home/trainer && mkdir -p .cache/huggingface /workspace/open_rm/output /workspace/open_rm/local_dataset_cache \
    && chown -R trainer .cache /workspace/open_rm
USER trainer
WORKDIR /workspace/open_rm
COPY --chown=trainer . .
CMD ["bash", "scripts/train/debug/reward_modeling.sh"]
