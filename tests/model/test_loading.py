"""Loading, the score head, dropout, and where the reward is read."""

import math

import pytest
import torch
from conftest import load_model
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from open_rm.batching.layouts import lay_out
from open_rm.errors import UserError
from open_rm.flags import ModelFlags
from open_rm.model import families
from open_rm.model.kernels import apply_fused_kernels
from open_rm.model.loading import load_reward_model
from open_rm.model.reward_model import ScoreHead, head_of


def load(folder, tokenizer, *, seed=1, dtype=torch.float32, **flags):
    """The model and the lines for the log."""
    return load_reward_model(ModelFlags(model_name_or_path=str(folder), **flags), tokenizer, seed=seed, dtype=dtype)


def rewards(reward_model, pairs, pad_token_id):
    batch = lay_out("padded", pairs, pad_token_id=pad_token_id, prompt_ids=range(len(pairs)))
    return reward_model(**batch.inputs(torch.device("cpu")))


PAIRS = [([5, 6, 7, 8, 9, 10], [5, 6, 11]), ([20, 21], [20, 22, 23, 24])]


def test_head_is_normal_with_std_1_over_sqrt_width_plus_1(toy, tokenizer):
    reward_model, notes = load(toy / "model", tokenizer)
    weight = reward_model.classifier.score.weight
    assert weight.shape == (1, 128)
    # 128 draws: the sample's std is within four standard errors, sigma / sqrt(2 n)
    assert weight.std().item() == pytest.approx(1 / math.sqrt(129), abs=4 / math.sqrt(129) / math.sqrt(256))
    assert any("score head initialised" in note for note in notes)
    again = load_model(toy / "model", tokenizer)
    other, _ = load(toy / "model", tokenizer, seed=2)
    assert torch.equal(weight, again.classifier.score.weight)
    assert not torch.equal(weight, other.classifier.score.weight)


def test_an_existing_reward_models_head_is_kept(toy, tokenizer, tmp_path):
    first = load_model(toy / "model", tokenizer)
    first.classifier.save_pretrained(tmp_path)
    second, notes = load(tmp_path, tokenizer, seed=9)
    assert torch.equal(first.classifier.score.weight, second.classifier.score.weight)
    assert "the checkpoint already is a reward model: its score head is kept" in notes


def test_a_classifier_with_two_outputs_is_refused(toy, tokenizer, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(toy / "model", num_labels=2).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot be loaded as a reward model"):
        load(tmp_path, tokenizer)


def test_rewards_do_not_depend_on_padding_or_company(toy, tokenizer):
    reward_model = load_model(toy / "model", tokenizer)
    together = rewards(reward_model, PAIRS, tokenizer.pad_token_id)
    alone = [rewards(reward_model, [pair], tokenizer.pad_token_id) for pair in PAIRS]
    # chosen of both pairs, then rejected of both; float32 sums in another order: 1e-6
    assert torch.allclose(together, torch.stack(alone).T.flatten(), atol=1e-6)


def test_rewards_equal_plain_transformers(toy, tokenizer, tmp_path):
    reward_model = load_model(toy / "model", tokenizer)
    reward_model.classifier.save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    ours = rewards(reward_model, PAIRS, tokenizer.pad_token_id)
    sequences = [pair[side] for side in (0, 1) for pair in PAIRS]
    theirs = torch.stack([plain(input_ids=torch.tensor([ids])).logits.squeeze() for ids in sequences])
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_eos_inside_a_conversation_is_not_the_place_that_is_read(toy, tokenizer):
    reward_model = load_model(toy / "model", tokenizer)
    eos = tokenizer.eos_token_id
    first = rewards(reward_model, [([5, eos, 6, 7, eos], [5, eos])], tokenizer.pad_token_id)
    changed = rewards(reward_model, [([5, eos, 6, 9, eos], [5, eos])], tokenizer.pad_token_id)
    assert first[0] != changed[0]  # tokens after the first eos count
    assert first[1] == changed[1]


def test_swapping_chosen_and_rejected_negates_the_margin(toy, tokenizer):
    reward_model = load_model(toy / "model", tokenizer)
    chosen, rejected = rewards(reward_model, PAIRS, tokenizer.pad_token_id).chunk(2)
    swapped_chosen, swapped_rejected = rewards(
        reward_model, [pair[::-1] for pair in PAIRS], tokenizer.pad_token_id
    ).chunk(2)
    assert torch.allclose(chosen - rejected, swapped_rejected - swapped_chosen, atol=1e-6)


def test_dropout_is_off_in_training_mode_in_modules_and_in_config(tokenizer, tmp_path):
    config = GPT2Config(
        vocab_size=1100, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    reward_model = load_model(tmp_path, tokenizer)
    assert reward_model.training
    assert torch.equal(
        rewards(reward_model, PAIRS, tokenizer.pad_token_id), rewards(reward_model, PAIRS, tokenizer.pad_token_id)
    )
    # Llama reads attention_dropout from its attention modules at every call, not from nn.Dropout
    config = Qwen2Config(
        vocab_size=1100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, attention_dropout=0.5,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "qwen")
    reward_model = load_model(tmp_path / "qwen", tokenizer)
    assert torch.equal(
        rewards(reward_model, PAIRS, tokenizer.pad_token_id), rewards(reward_model, PAIRS, tokenizer.pad_token_id)
    )


@pytest.mark.parametrize(
    ("config_class", "model_class"), [(GPTNeoXConfig, GPTNeoXForCausalLM), (Qwen2Config, Qwen2ForCausalLM)]
)
def test_embeddings_grow_for_an_added_pad_token_and_only_then(config_class, model_class, tokenizer, tmp_path):
    tokenizer.add_special_tokens({"pad_token": "<|new pad|>"})
    assert tokenizer.pad_token_id == len(tokenizer) - 1
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    for rows, grows in ((len(tokenizer) - 1, True), (len(tokenizer) + 40, False)):
        model_class(config_class(vocab_size=rows, **sizes)).save_pretrained(tmp_path / str(rows))
        reward_model, notes = load(tmp_path / str(rows), tokenizer)
        assert any("embeddings resized" in note for note in notes) == grows
        assert reward_model.classifier.get_input_embeddings().weight.shape[0] == max(rows, len(tokenizer))
        reward_model.classifier.save_pretrained(tmp_path / f"saved {rows}")
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / f"saved {rows}")
        assert plain.config.pad_token_id == tokenizer.pad_token_id


def test_score_head_is_float32_in_a_bfloat16_model(toy, tokenizer):
    reward_model, _ = load(toy / "model", tokenizer, dtype=torch.bfloat16)
    assert reward_model.classifier.score.weight.dtype == torch.bfloat16
    assert rewards(reward_model, PAIRS, tokenizer.pad_token_id).dtype == torch.float32


def read_config(folder, max_token_length):
    return families.read_config(ModelFlags(model_name_or_path=str(folder)), max_token_length=max_token_length)


def test_more_tokens_than_positions_is_refused_from_the_config_alone(toy):
    config = read_config(toy / "model", 2048)
    assert (config.hidden_size, config.model_type) == (128, "llama")
    with pytest.raises(UserError, match="--max_token_length 4096 is beyond the 2048 positions"):
        read_config(toy / "model", 4096)


def test_missing_model_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="--model_name_or_path"):
        read_config(tmp_path / "nothing", 10)


def test_unknown_attention_is_refused_by_name(toy, tokenizer):
    with pytest.raises(UserError, match="cannot be loaded as a reward model"):
        load(toy / "model", tokenizer, attn_implementation="no_such_attention")


def test_without_a_gpu_liger_says_why_it_is_off(toy, tokenizer):
    reward_model = load_model(toy / "model", tokenizer)
    assert "no GPU" in apply_fused_kernels(reward_model, torch.device("cpu"))


def test_the_head_is_the_linear_layer_that_transformers_saves_and_no_other_is_taken_for_it(toy, tokenizer):
    classifier = AutoModelForSequenceClassification.from_pretrained(toy / "model", num_labels=1)
    assert head_of(classifier) is classifier.score
    reward_model = load_model(toy / "model", tokenizer)
    assert head_of(reward_model.classifier) is reward_model.head is reward_model.classifier.score
    assert isinstance(reward_model.head, ScoreHead)
    encoder = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    bert = BertForSequenceClassification(BertConfig(**encoder, num_labels=1))
    assert head_of(bert) is bert.classifier
    # its classifier is not known here: two layers, of which the reward would be neither
    assert head_of(RobertaForSequenceClassification(RobertaConfig(**encoder, num_labels=1))) is None
