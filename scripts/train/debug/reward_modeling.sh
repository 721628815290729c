#!/usr/bin/env bash
# What:  a small reward model from a small preference set, both made from a seed: the whole recipe in about a minute.
# Needs: Python 3.11+; no GPU, no network beyond pip, no account. Sets up .venv by itself.
# Gives: output/<run name>/: the model, README.md, curves.png, metrics.jsonl.
#
# MODEL, DATASET and EVAL_DATASET put your own in place (Hub name, file or folder); any flag overrides: "$@" comes last.
#   MODEL=my/model DATASET=pairs.jsonl EVAL_DATASET=held_out.jsonl bash scripts/train/debug/reward_modeling.sh
# A step is 16 pairs on any number of devices that divides it: GPUS=2 for several in one machine. DRY=1 prints the command.
set -euo pipefail
cd "$(dirname "$0")/../../.."
source scripts/launch.sh

TOY=${TOY:-output/toy}
MODEL=${MODEL:-$TOY/model}
DATASET=${DATASET:-$TOY/data}
EVAL_DATASET=${EVAL_DATASET:-$TOY/data}
GLOBAL_BATCH=${GLOBAL_BATCH:-16}
PER_DEVICE=${PER_DEVICE:-16}
flags=(
    --exp_name debug
    --model_name_or_path "$MODEL"
    --dataset_mixer_list "$DATASET" 1.0
    --dataset_mixer_eval_list "$EVAL_DATASET" 1.0
    --max_token_length 1024
    --max_prompt_token_length 1024
    --per_device_eval_batch_size 32
    --learning_rate 5e-4                  # high, because the toy model starts from random weights
    --warmup_ratio 0.05
    --num_train_epochs 1
    --num_evals 5
    --seed 1
)

make_inputs() {
    if [[ "$MODEL $DATASET $EVAL_DATASET" == *"$TOY"* ]]; then "$PYTHON" -m open_rm.toy --folder "$TOY"; fi
}
launch "${flags[@]}" "$@"
