#!/usr/bin/env bash
# What:  allenai/Llama-3.1-Tulu-3-8B-RM again: Tulu-3 8B SFT on the Tulu-3 preference mixture (about 270 K pairs).
# Needs: 8 nodes of 8 GPUs by default; run it once on every node. One node works too: NNODES=1.
#        NNODES, NODE_RANK and MASTER_ADDR say who is who; under Slurm (srun, one task per node) its variables do.
#        HF_TOKEN and WANDB_API_KEY in the environment for push and tracking.
# Gives: output/<run name>/ on the first node, pushed to a private repository on the Hub.
#
# The step is 256 pairs on any number of devices: accumulation follows from it. DRY=1 prints the command.
set -euo pipefail
cd "$(dirname "$0")/../../.."

GLOBAL_BATCH=${GLOBAL_BATCH:-256}                                 # pairs per optimizer step
PER_DEVICE=${PER_DEVICE:-1}                                       # pairs per forward: 2 x 4096 tokens
NNODES=${NNODES:-${SLURM_NNODES:-8}}
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}
GPUS_PER_NODE=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}
GPUS_PER_NODE=${GPUS_PER_NODE##*:}                                # Slurm may write gpu:8
MASTER_PORT=${MASTER_PORT:-29500}
if [[ -z ${MASTER_ADDR:-} && -n ${SLURM_JOB_NODELIST:-} ]]; then
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
fi
if [[ -z ${MASTER_ADDR:-} ]]; then
    if (( NNODES > 1 )) && [[ ${DRY:-0} != 1 ]]; then
        echo "error: MASTER_ADDR is not set; export the address of the first of the $NNODES nodes on every node" >&2
        exit 1
    fi
    MASTER_ADDR=127.0.0.1
fi

for number in "$GLOBAL_BATCH" "$PER_DEVICE" "$NNODES" "$GPUS_PER_NODE"; do
    if ! [[ $number =~ ^[1-9][0-9]*$ ]]; then
        echo "error: GLOBAL_BATCH, PER_DEVICE, NNODES and GPUS_PER_NODE are counts of 1 or more, not '$number'" >&2
        exit 1
    fi
done
per_forward=$((PER_DEVICE * NNODES * GPUS_PER_NODE))
if (( GLOBAL_BATCH % per_forward != 0 )); then
    echo "error: GLOBAL_BATCH=$GLOBAL_BATCH is not a multiple of PER_DEVICE x NNODES x GPUS_PER_NODE = $per_forward" >&2
    exit 1
fi

flags=(
    --exp_name tulu3_8b_rm
    --model_name_or_path allenai/Llama-3.1-Tulu-3-8B-SFT
    --model_revision main
    --tokenizer_name allenai/Llama-3.1-Tulu-3-8B-SFT
    --tokenizer_revision main
    --dataset_mixer_list allenai/llama-3.1-tulu-3-8b-preference-mixture 1.0
    --max_token_length 4096
    --max_prompt_token_length 2048
    --per_device_train_batch_size "$PER_DEVICE"
    --gradient_accumulation_steps $((GLOBAL_BATCH / per_forward))
    --learning_rate 3e-6
    --lr_scheduler_type linear
    --num_train_epochs 1
    --gradient_checkpointing
    --deepspeed configs/ds/zero3.json
    --seed 8
    --with_tracking
    --push_to_hub
)

launcher=(
    -m torch.distributed.run
    --nnodes "$NNODES"
    --node_rank "$NODE_RANK"
    --nproc_per_node "$GPUS_PER_NODE"
    --master_addr "$MASTER_ADDR"
    --master_port "$MASTER_PORT"
)
command=("${launcher[@]}" -m open_rm.reward_modeling "${flags[@]}" "$@")
if [[ ${DRY:-0} == 1 ]]; then
    printf '%q ' python "${command[@]}"; echo
    exit
fi
source scripts/environment.sh
set_up_python requirements.txt
exec "$PYTHON" "${command[@]}"
