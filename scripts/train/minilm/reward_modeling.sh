#!/usr/bin/env bash
# What:  a pretrained encoder of 22 M weights (all-MiniLM-L6-v2) as a reward model, on a laptop.
# Needs: Python 3.11+, no GPU. MODEL: the encoder's folder or Hub name; DATASET, EVAL_DATASET: pairs of messages, by default
#        ../shared/data/alpaca_eval. VARIANT=decoder: instead a decoder of its sizes with random weights, which it
#        writes to DECODER (output/decoder).
# Gives: output/<run name>/, in 10 to 20 minutes on 2 cores; the decoder in 4.
set -euo pipefail
cd "$(dirname "$0")/../../.."
source scripts/launch.sh

MODEL=${MODEL:-sentence-transformers/all-MiniLM-L6-v2}
DATASET=${DATASET:-../shared/data/alpaca_eval/train.jsonl}
EVAL_DATASET=${EVAL_DATASET:-../shared/data/alpaca_eval/test.jsonl}
VARIANT=${VARIANT:-encoder}
DECODER=${DECODER:-output/decoder}
PER_DEVICE=${PER_DEVICE:-8}
GLOBAL_BATCH=${GLOBAL_BATCH:-16}
flags=(
    --exp_name minilm_rm
    --model_name_or_path "$MODEL"
    --dataset_mixer_list "$DATASET" 1.0
    --dataset_mixer_eval_list "$EVAL_DATASET" 1.0
    --chat_template_name encoder          # [CLS] prompt [SEP] answer [SEP]; the reward is read at [CLS]
    --max_token_length 512                # the encoder's positions
    --max_prompt_token_length 256
    --overlength truncate
    --skip_bad_rows 20                    # pairs that are one to a tokenizer without capitals
    --learning_rate 5e-5
    --warmup_ratio 0.1
    --num_train_epochs 1                  # a second one overfits: 0.755 after it
    --num_evals 3
)
make_inputs() {
    [[ $VARIANT == decoder ]] || return 0
    "$PYTHON" - "$MODEL" "$DECODER" <<'PY'
import sys
import tempfile
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

from open_rm.toy import put

try:
    encoder, tokenizer = AutoConfig.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
except (OSError, ValueError) as error:
    sys.exit(f"error: MODEL={sys.argv[1]}: cannot be read ({str(error).splitlines()[0]})")
names = "vocab_size hidden_size num_hidden_layers num_attention_heads max_position_embeddings".split()
config = LlamaConfig(
    **{name: getattr(encoder, name) for name in names},
    intermediate_size=encoder.intermediate_size * 2 // 3,  # three matrices a layer where an encoder has two
    bos_token_id=tokenizer.cls_token_id, eos_token_id=tokenizer.sep_token_id, pad_token_id=tokenizer.pad_token_id,
)
set_seed(1)
decoder = Path(sys.argv[2])
decoder.mkdir(parents=True, exist_ok=True)
with tempfile.TemporaryDirectory(dir=decoder, prefix=".making_") as made:  # several nodes may make it at the same time
    LlamaForCausalLM(config).save_pretrained(made)
    tokenizer.save_pretrained(made)
    put(Path(made), decoder)
PY
}
case $VARIANT in
    encoder) ;;
    decoder)
        flags+=(--exp_name decoder_rm --model_name_or_path "$DECODER" --learning_rate 3e-4 --group_by_prompt) ;;
    *) echo "error: VARIANT is encoder or decoder, not '$VARIANT'" >&2; exit 1 ;;
esac
launch "${flags[@]}" "$@"
