"""Heads for attributes: rewards are those of one row, which is what is saved, in every way to hold the weights."""

import dataclasses

import pytest
import torch
from conftest import REPOSITORY, launch, load_model
from transformers import AutoModelForSequenceClassification

from open_rm.errors import UserError
from open_rm.flags import AdapterFlags, ModelFlags
from open_rm.model import attributes
from open_rm.model.loading import load_reward_model

WEIGHTS = [0.5, -0.25, 2.0]


def drawn(model, seed: int = 0):
    """The model with a head of numbers, as training would have left it."""
    with torch.no_grad():
        model.head.weight.normal_(generator=torch.Generator().manual_seed(seed))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_merged_row_gives_the_reward_and_the_rows_their_attributes(toy, tokenizer, dtype):
    flags = ModelFlags(model_name_or_path=str(toy / "model"), attribute_weights=WEIGHTS)
    model = drawn(load_reward_model(flags, tokenizer, dtype=dtype)[0])
    hidden = torch.randn(5, model.width, generator=torch.Generator().manual_seed(1)).to(dtype)
    trained = model.head(hidden)
    rows = model.head.weight.detach().float()
    assert trained.shape == (5, 4)
    torch.testing.assert_close(trained[:, 1:], hidden.float() @ rows[1:].T)
    whole = rows[0] + torch.tensor(WEIGHTS) @ rows[1:]
    torch.testing.assert_close(trained[:, 0], hidden.float() @ whole.to(dtype).float(), rtol=1e-2, atol=1e-2)
    model.eval()
    saved = attributes.merged_row(model.head.weight, WEIGHTS).float()
    assert torch.equal(model.head(hidden), torch.nn.functional.linear(hidden.float(), saved))
    torch.testing.assert_close(model.head(hidden)[:, 0], trained[:, 0])


def test_gradients_are_those_of_the_separate_heads(toy, tokenizer):
    flags = ModelFlags(model_name_or_path=str(toy / "model"), attribute_weights=WEIGHTS)
    model = drawn(load_reward_model(flags, tokenizer)[0])
    hidden, pull = torch.randn(5, model.width), torch.randn(5, 4)
    (model.head(hidden) * pull).sum().backward()
    rows = model.head.weight.detach().clone().requires_grad_()
    parts = hidden @ rows.T
    reward = parts[:, :1] + parts[:, 1:] @ torch.tensor(WEIGHTS)[:, None]
    (torch.cat((reward, parts[:, 1:]), 1) * pull).sum().backward()
    torch.testing.assert_close(model.head.weight.grad, rows.grad, rtol=1e-5, atol=1e-5)


def test_it_begins_with_the_rewards_of_a_plain_model(toy, tokenizer):
    ids = {"input_ids": torch.randint(5, 50, (2, 7)), "reward_index": torch.tensor([6, 13])}
    ids |= {"read_index": ids["reward_index"], "attention_mask": torch.ones(2, 7, dtype=torch.int64)}
    plain = load_model(toy / "model", tokenizer)
    with_them = load_model(toy / "model", tokenizer, attribute_weights=WEIGHTS)
    assert with_them(**ids).shape == (2, 4)
    torch.testing.assert_close(with_them(**ids)[:, 0], plain(**ids))
    assert not with_them(**ids)[:, 1:].any()


def test_an_encoder_is_refused():
    config = dataclasses.make_dataclass("Config", [("model_type", str)])("bert")
    with pytest.raises(UserError, match="--attributes: some/bert is an encoder"):
        attributes.check(config, WEIGHTS, "some/bert")
    attributes.check(config, [], "some/bert")


def test_the_saved_state_has_one_row_also_of_an_adapter(toy, tokenizer):
    flags = ModelFlags(model_name_or_path=str(toy / "model"), attribute_weights=WEIGHTS)
    for adapter in (AdapterFlags(), AdapterFlags(use_peft=True, lora_r=2)):
        model = drawn(load_reward_model(flags, tokenizer, adapter=adapter)[0])
        state = {name.removeprefix("classifier."): value for name, value in model.state_dict().items()}
        heads = {name: value for name, value in attributes.merged_state(state, WEIGHTS).items() if "score" in name}
        assert {tuple(value.shape) for value in heads.values()} == {(1, model.width)}
        own = next(value for name, value in heads.items() if "original" not in name)
        assert torch.equal(own, attributes.merged_row(model.head.weight, WEIGHTS))


def test_a_client_reads_the_rewards_of_training(toy, tokenizer, tmp_path):
    flags = ModelFlags(model_name_or_path=str(toy / "model"), attribute_weights=WEIGHTS)
    model = drawn(load_reward_model(flags, tokenizer)[0])
    state = {name.removeprefix("classifier."): value for name, value in model.state_dict().items()}
    model.classifier.save_pretrained(tmp_path, state_dict=attributes.merged_state(state, WEIGHTS))
    client = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    ids = torch.randint(5, 50, (1, 7))
    known = {"reward_index": torch.tensor([6]), "read_index": torch.tensor([6])}
    with torch.no_grad():
        ours = model(input_ids=ids, attention_mask=torch.ones_like(ids), **known)[:, 0]
        torch.testing.assert_close(client(ids).logits[:, 0], ours)


STEPS = """
import sys, torch
from open_rm.data.tokenizer import load_tokenizer
from open_rm.flags import BatchFlags, ModelFlags, OptimizerFlags
from open_rm.model.loading import load_reward_model
from open_rm.ranks import joined_ranks
from open_rm.training.ds_config import fill_config
from open_rm.training.engine import Engine

toy, stage, out = sys.argv[1:]
with joined_ranks() as ranks:
    config = fill_config(BatchFlags(deepspeed=stage), width=128, bf16=False, max_grad_norm=0.0)
    flags = ModelFlags(model_name_or_path=toy + "/model", attribute_weights=[0.5, -0.25, 2.0])
    model, _ = load_reward_model(flags, load_tokenizer(flags.model_name_or_path), deepspeed_config=config)
    trainer = Engine(model, OptimizerFlags(learning_rate=1e-2), config, ranks)
    ids = torch.randint(5, 50, (4, 7), generator=torch.Generator().manual_seed(0))
    share = ids.chunk(ranks.world_size)[ranks.rank]
    last = torch.arange(len(share)) * 7 + 6
    for _ in range(3):
        read = trainer(input_ids=share, attention_mask=torch.ones_like(share), reward_index=last, read_index=last)
        trainer.backward(((read - torch.arange(4.0)) ** 2).sum() / 4, last=True)
        trainer.step()
    state = trainer.gathered_state()
    if ranks.is_main:
        torch.save({name: value for name, value in state.items() if "score" in name or "layers.0" in name}, out)
"""


def test_ranks_and_zero_stages_train_the_same_rows(toy, tmp_path):
    script = tmp_path / "steps.py"
    script.write_text(STEPS)
    states = []
    for processes, stage in ((1, "zero0"), (2, "zero2"), (2, "zero3")):
        out = tmp_path / f"{processes}{stage}.pt"
        config = REPOSITORY / f"configs/ds/{stage}.json"
        done = launch(script, str(toy), str(config), str(out), processes=processes, env={"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
        states.append(torch.load(out))
    assert states[0]["classifier.score.weight"].shape == (4, 128)
    assert states[0]["classifier.score.weight"][1:].abs().max() > 5e-3
    for other in states[1:]:
        assert other.keys() == states[0].keys()
        for name, value in other.items():
            # Adam divides by the gradient's size, so a gradient near 0 comes out of another order of sums quite different
            torch.testing.assert_close(value, states[0][name], rtol=0, atol=1e-5 if "score" in name else 1e-3)
