"""On a GPU: the rewards of a Scorer are those of the CPU, and the same call gives the same bits there, too."""

import json

import pytest
from conftest import in_a_process, on_gpu
from test_scorer import classifier

SCORE = """
import json, sys
import numpy as np
from open_rm.flags import OpeningFlags
from open_rm.scoring.opening import open_scorer

rng = np.random.default_rng(0)
prompts = [rng.integers(5, 600, rng.integers(10, 400)) for _ in range(12)]
sequences = [np.concatenate((p, rng.integers(5, 600, rng.integers(1, 200)))).tolist() for p in prompts for _ in range(4)]
found = {}
for name, flags in json.loads(sys.argv[2]).items():
    with open_scorer(OpeningFlags(model=sys.argv[1], **flags)) as scorer:
        first, again = scorer.rewards(sequences), scorer.rewards(sequences)
        found[name] = [first.tolist(), first.tobytes() == again.tobytes(), "; ".join(scorer.lines)]
print(json.dumps(found))
"""
ON_GPU = {
    "float32": {"dtype": "float32"},
    "float32, small": {"dtype": "float32", "max_tokens_per_micro_batch": 1000},
    "shared_prefix": {"dtype": "bfloat16"},
    "shared_prefix, small": {"dtype": "bfloat16", "max_tokens_per_micro_batch": 1000},
    "packed": {"dtype": "bfloat16", "batching": "packed"},
    "padded": {"dtype": "bfloat16", "batching": "padded"},
}
ON_CPU = {"float32": {"dtype": "float32"}, "bfloat16": {"dtype": "bfloat16"}}


@pytest.mark.gpu
def test_rewards_on_a_gpu_are_those_of_the_cpu(tmp_path, tokenizer):
    """float32 without TF32, in another order of sums: 1e-4. bfloat16: as far from float32 as on the CPU, with luck and a half."""
    shape = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    classifier(tmp_path, tokenizer, **shape, intermediate_size=512, vocab_size=640, max_position_embeddings=1024)
    cpu = in_a_process(SCORE, tmp_path, json.dumps(ON_CPU))
    gpu = on_gpu(SCORE, tmp_path, json.dumps(ON_GPU))
    right = cpu["float32"][0]

    def apart(rewards: list[float]) -> float:
        return max(abs(ours - theirs) for ours, theirs in zip(rewards, right, strict=True))

    noise = apart(cpu["bfloat16"][0])
    print({name: apart(rewards) for name, (rewards, *_) in gpu.items()}, "on the CPU in bfloat16:", noise)
    for name, (rewards, same_again, lines) in gpu.items():
        assert same_again, name
        assert name.split(",")[0] in lines, lines
        assert apart(rewards) < (1e-4 if name.startswith("float32") else 2.5 * noise), name
