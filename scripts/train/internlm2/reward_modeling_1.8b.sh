#!/usr/bin/env bash
# What:  XTuner's internlm2_chat_1_8b_reward_full_ultrafeedback: InternLM2-chat-1.8B-SFT on UltraFeedback, focal loss with
#        log barrier, zero head, reward token. QLORA=1: its QLoRA variant (rank 64, alpha 16, learning rate 1e-4).
# Needs: one GPU of 80 GB, or several (GPUS=8); QLORA=1: one of 24 GB. Network for the data. MODEL: the folder of
#        internlm/internlm2-chat-1_8b-sft as a Llama, which it is but for names. Its own Python code was written for
#        transformers 4 and gives no rewards under 5; InternLM's tool makes the folder (it wants sentencepiece and einops):
#          python tools/convert2llama.py --src internlm2-chat-1_8b-sft --tgt MODEL    # github.com/InternLM/InternLM
# Gives: output/<run name>/, a model that needs no code.
set -euo pipefail
cd "$(dirname "$0")/../../.."
source scripts/launch.sh

MODEL=${MODEL:-output/internlm2-chat-1_8b-sft-llama}
if [[ ${DRY:-0} != 1 && ! -d $MODEL ]]; then
    echo "error: there is no folder $MODEL; make it with convert2llama.py, as the head of this script says" >&2
    exit 1
fi
PER_DEVICE=${PER_DEVICE:-1}               # pairs per forward: 2 x 2048 tokens
if [[ ${QLORA:-0} == 1 ]]; then GLOBAL_BATCH=${GLOBAL_BATCH:-16}; else GLOBAL_BATCH=${GLOBAL_BATCH:-64}; fi
# XTuner's 4 x 16 pairs; of its QLoRA variant, which counts 1 x 16 rows of 4096 tokens, only the number
flags=(
    --exp_name internlm2_1.8b_rm
    --model_name_or_path "$MODEL"
    --dataset_mixer_list argilla/ultrafeedback-binarized-preferences-cleaned 1.0
    --max_token_length 2048
    --max_prompt_token_length 2048
    --overlength truncate                 # as XTuner; pairs that became identical are dropped and counted
    --reward_token "[UNUSED_TOKEN_130]"
    --score_init zeros
    --loss_type focal
    --penalty_type log_barrier
    --lr_scheduler_type cosine
    --warmup_ratio 0.03
    --num_train_epochs 1                  # XTuner: more overfits
)
if [[ ${QLORA:-0} == 1 ]]; then
    flags+=(--use_peft --load_in_4bit --lora_r 64 --lora_alpha 16 --lora_dropout 0.1 --learning_rate 1e-4)
    flags+=(--merge_adapter)              # its config pads with eos; clients of an adapter would read the reward before it
else
    flags+=(--learning_rate 2e-5 --deepspeed configs/ds/zero2.json)
fi
launch "${flags[@]}" "$@"
