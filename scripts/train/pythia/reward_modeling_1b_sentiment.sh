#!/usr/bin/env bash
# What:  TRL's example: pythia-1b-deduped on the sentiment preferences of Ziegler et al. 2019. VARIANT=center adds TRL's
#        recommended centering, VARIANT=margin trains with margins; for those, DATASET has to have a column `margin`.
# Needs: one GPU of 24 GB; network for model and data.
# Gives: output/<run name>/, in a few minutes.
set -euo pipefail
cd "$(dirname "$0")/../../.."
source scripts/launch.sh

DATASET=${DATASET:-trl-internal-testing/sentiment-trl-style}
PER_DEVICE=${PER_DEVICE:-32}
GLOBAL_BATCH=${GLOBAL_BATCH:-32}
flags=(
    --exp_name pythia_1b_sentiment_rm
    --model_name_or_path EleutherAI/pythia-1b-deduped
    --dataset_mixer_list "$DATASET" 1.0
    --dataset_mixer_eval_list "$DATASET" 1.0
    --chat_template_name simple_concat
    --max_token_length 1024
    --max_prompt_token_length 1024
    --per_device_eval_batch_size 32
    --learning_rate 3e-6
    --num_train_epochs 1
    --eval_steps 100
)
case ${VARIANT:-plain} in
    plain) ;;
    center) flags+=(--center_rewards_coefficient 0.01) ;;
    margin) flags+=(--margin_loss) ;;
    *) echo "error: VARIANT is plain, center or margin, not '$VARIANT'" >&2; exit 1 ;;
esac
launch "${flags[@]}" "$@"
