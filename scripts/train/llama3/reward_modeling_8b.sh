#!/usr/bin/env bash
# What:  XTuner's llama3_8b_instruct_reward_full_varlenattn_ultrafeedback: Llama-3-8B-Instruct on UltraFeedback, a reserved
#        token as reward token, focal loss with log barrier. QLORA=1: the same with 4-bit weights and LoRA.
# Needs: 8 GPUs of 80 GB (GPUS=8); QLORA=1: one of 48 GB. HF_TOKEN with access to meta-llama.
# Gives: output/<run name>/; with QLORA=1 the adapter and the head, or with --merge_adapter a whole model.
set -euo pipefail
cd "$(dirname "$0")/../../.."
source scripts/launch.sh

if [[ ${QLORA:-0} != 1 ]]; then GPUS_PER_NODE=${GPUS_PER_NODE:-8}; fi
PER_DEVICE=${PER_DEVICE:-1}               # pairs per forward: 2 x 2048 tokens
GLOBAL_BATCH=${GLOBAL_BATCH:-128}         # pairs per step; XTuner counts 1 x 16 rows of 4096 tokens on 8 devices
flags=(
    --exp_name llama3_8b_rm
    --model_name_or_path meta-llama/Meta-Llama-3-8B-Instruct
    --dataset_mixer_list argilla/ultrafeedback-binarized-preferences-cleaned 1.0
    --max_token_length 2048
    --max_prompt_token_length 2048
    --overlength truncate
    --reward_token "<|reserved_special_token_0|>"
    --score_init zeros
    --loss_type focal
    --penalty_type log_barrier
    --lr_scheduler_type cosine
    --warmup_ratio 0.03
    --num_train_epochs 1
)
if [[ ${QLORA:-0} == 1 ]]; then
    flags+=(--use_peft --load_in_4bit --lora_r 64 --lora_alpha 16 --lora_dropout 0.1 --learning_rate 1e-4)
else
    flags+=(--learning_rate 2e-5 --deepspeed configs/ds/zero3.json)
fi
launch "${flags[@]}" "$@"
