#!/usr/bin/env bash
# What:  allenai/Llama-3.1-Tulu-3-8B-RM again: Tulu-3 8B SFT on the Tulu-3 preference mixture (about 270 K pairs).
# Needs: 8 nodes of 8 GPUs by default; run it once on every node. One node works too: NNODES=1.
#        NNODES, NODE_RANK and MASTER_ADDR say who is who; under Slurm and Kubernetes their variables do (docs/cluster.md).
#        HF_TOKEN and WANDB_API_KEY in the environment for push and tracking.
# Gives: output/<run name>/ on the first node, pushed to a private repository on the Hub.
#
# The step is 256 pairs on any number of devices: accumulation follows from it. DRY=1 prints the command.
set -euo pipefail
cd "$(dirname "$0")/../../.."
source scripts/launch.sh

GLOBAL_BATCH=${GLOBAL_BATCH:-256}
PER_DEVICE=${PER_DEVICE:-1}               # pairs per forward: 2 x 4096 tokens
NNODES=${NNODES:-8}
GPUS_PER_NODE=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}
flags=(
    --exp_name tulu3_8b_rm
    --model_name_or_path allenai/Llama-3.1-Tulu-3-8B-SFT
    --model_revision main
    --tokenizer_name allenai/Llama-3.1-Tulu-3-8B-SFT
    --tokenizer_revision main
    --dataset_mixer_list allenai/llama-3.1-tulu-3-8b-preference-mixture 1.0
    --max_token_length 4096
    --max_prompt_token_length 2048
    --learning_rate 3e-6
    --lr_scheduler_type linear
    --num_train_epochs 1
    --deepspeed configs/ds/zero3.json
    --seed 8
    --with_tracking
    --push_to_hub
)
launch "${flags[@]}" "$@"
