"""Recomputed layers give the same gradients, whatever is computed meanwhile; what a forward keeps is counted."""

import pytest
import torch
from conftest import load_model
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForSequenceClassification,
    LlamaConfig,
    OpenAIGPTConfig,
    OpenAIGPTForSequenceClassification,
)

from open_rm.batching.layouts import lay_out, lay_out_sequences
from open_rm.errors import UserError
from open_rm.model.last_layer import READ_ONLY
from open_rm.model.recompute import MEASURED, Saved, describe, layers_of, measured_tokens, recompute

PAIRS = [([5, 6, 7, 8, 9, 10], [5, 6, 7, 11]), ([12, 13, 14], [12, 13, 15, 16, 17])]
OTHERS = [([21, 22, 23, 24], [21, 22, 25, 26, 27, 28, 29])]


@pytest.fixture
def folder(tmp_path, tokenizer):
    """Five layers, so that every second and every third of them are others."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "five")
    return tmp_path / "five"


def inputs(tokenizer, layout, pairs=PAIRS):
    batch = lay_out(layout, pairs, pad_token_id=tokenizer.pad_token_id, prompt_ids=range(len(pairs)))
    return batch.inputs(torch.device("cpu"))


def gradients(model, tokenizer, layout):
    model.zero_grad()
    model(**inputs(tokenizer, layout)).sum().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prefix"])
@pytest.mark.parametrize(("every", "which"), [(1, [0, 1, 2, 3]), (2, [0, 2]), (3, [0, 3]), (4, [0]), (9, [0])])
def test_every_nth_layer_is_recomputed_the_last_never_and_gradients_stay_bit_for_bit(
    folder, tokenizer, layout, every, which
):
    model = load_model(folder, tokenizer, layout=layout)
    kept = gradients(model, tokenizer, layout)
    assert recompute(model.classifier, every) == len(which)
    layers = layers_of(model.classifier)
    assert [n for n, layer in enumerate(layers) if layer.gradient_checkpointing] == which
    runs = [0] * len(layers)
    for number, layer in enumerate(layers):

        def count(*_, number=number):
            runs[number] += 1

        layer.input_layernorm.register_forward_hook(count)
    assert all(map(torch.equal, gradients(model, tokenizer, layout), kept))
    assert runs == [2 if number in which else 1 for number in range(5)]  # it really is computed again
    assert recompute(model.classifier, 0) == 0  # and off again
    runs[:] = [0] * 5
    assert all(map(torch.equal, gradients(model, tokenizer, layout), kept)) and runs == [1] * 5


def test_a_second_forward_before_the_first_ones_backward_changes_no_gradient(folder, tokenizer):
    """The last layer's hooks know the latest forward's rows; recomputed, it would take those for the first one's."""
    model = load_model(folder, tokenizer, layout="packed", every=1)
    assert READ_ONLY and model.read_only_parameters
    alone = gradients(model, tokenizer, "packed")
    model.zero_grad()
    rewards = model(**inputs(tokenizer, "packed"))
    with torch.no_grad():
        model(**inputs(tokenizer, "packed", OTHERS))
    rewards.sum().backward()
    assert all(torch.equal(p.grad, before) for p, before in zip(model.parameters(), alone, strict=True))


def test_a_model_of_one_layer_has_nothing_to_recompute(tmp_path, tokenizer):
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "one")
    model = load_model(tmp_path / "one", tokenizer)
    assert recompute(model.classifier, 1) == 0
    assert describe(model.classifier, 1) == "activations: recomputed in 0 of 1 layers in the backward pass"


def test_what_a_forward_keeps_is_counted_once_a_token_without_weights(folder, tokenizer):
    """Twice the layers keep twice as much, recomputed ones keep their input alone, and float64 keeps twice of float32."""
    counted = {}
    for name, every, dtype in (("kept", 0, torch.float32), ("again", 1, torch.float32), ("double", 0, torch.float64)):
        model = load_model(folder, tokenizer, layout="packed", every=every).to(dtype)
        row = [*range(5, 5 + measured_tokens(251))]
        batch = lay_out_sequences("packed", [row], pad_token_id=0, prompt_of=[0])
        with Saved(len(row)) as saved:
            model(**batch.inputs(torch.device("cpu")))
        counted[name] = saved.per_token
    width, mlp, kv = 32, 64, 16
    layer = 4 * (
        4 * width + 2 * width + 2 * kv + 3 * mlp
    )  # norms in and out, q, attention out, k and v, MLP: the least
    assert 4 * layer < counted["kept"] < 3 * 5 * layer
    assert counted["again"] < 0.5 * counted["kept"]
    assert counted["double"] == pytest.approx(2 * counted["kept"], rel=0.15)  # indices and float32 sums stay


def test_the_measured_row_is_not_longer_than_the_data():
    assert [measured_tokens(n) for n in (5000, 509, 508, 64, 3)] == [509, 509, 251, 61, MEASURED[-1]]


def test_of_a_model_that_also_sees_the_layers_that_read_are_counted():
    small = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**small, "num_hidden_layers": 3, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 64},
        vision_config={**small, "num_hidden_layers": 5, "image_size": 28, "patch_size": 14},
        num_labels=1,
    )
    with torch.device("meta"):
        classifier = Gemma3ForSequenceClassification(config)
    assert len(layers_of(classifier)) == 3
    assert recompute(classifier, 1) == 2
    assert describe(classifier, 1) == "activations: recomputed in 2 of 3 layers in the backward pass"


def test_a_model_that_cannot_recompute_is_one_sentence():
    config = OpenAIGPTConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=2, num_labels=1)
    with torch.device("meta"):
        classifier = OpenAIGPTForSequenceClassification(config)
    assert recompute(classifier, 0) == 0
    with pytest.raises(
        UserError, match="OpenAIGPTForSequenceClassification .* cannot recompute its layers; pass off, or auto"
    ):
        recompute(classifier, 1)


def test_a_frozen_backbone_is_not_recomputed(folder, tokenizer):
    """It keeps nothing, and transformers would make gradients flow through all of it."""
    model = load_model(folder, tokenizer, freeze_backbone=True)
    assert recompute(model.classifier, 1) == 0
    model.head.weight.requires_grad_(False)
    assert not model(**inputs(tokenizer, "padded")).requires_grad
    assert describe(model.classifier, 1) == "activations: none are recomputed in the backward pass"
