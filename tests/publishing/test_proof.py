"""The proof that clients get our rewards: what it allows, where it computes, and that the device is free for it."""

import json

import pytest
import torch
from conftest import toy_flags

from open_rm import reward_modeling
from open_rm.command_line import parse
from open_rm.errors import UserError
from open_rm.evaluation.held_out import Probe
from open_rm.flags import Args
from open_rm.model.contract import Contract
from open_rm.publishing import proof
from open_rm.publishing.proof import ClientRewards, check_reload

CONTRACT = Contract(chat=False, ending="")


@pytest.fixture
def client(monkeypatch):
    """A client whose rewards are off by so much, computed in so many bits."""

    def answers(off: float, computed_in: str):
        monkeypatch.setattr(proof, "_check_encoding", lambda *_: None)
        monkeypatch.setattr(
            proof, "_in_this_process", lambda folder, probe: ClientRewards([1.0 + off], [1.0], computed_in, "cpu")
        )

    return answers


def check(noise: float) -> str:
    return check_reload("out", Probe([[5, 6]], [1.0], noise), None, CONTRACT, fresh_process=False)


@pytest.mark.parametrize(
    ("computed_in", "noise", "off", "passes"),
    [
        ("float32", 1e-6, 1.9e-4, True),  # 1e-4 * (1 + |1|)
        ("float32", 1e-6, 2.1e-4, False),
        ("float32", 9e-5, 2.1e-4, False),  # noise allows no more in float32
        ("bfloat16", 0.0, 0.09, True),
        ("bfloat16", 0.001, 0.11, False),
        ("bfloat16", 0.03, 0.17, True),  # a deep model: three times what the trainer's own layouts differ by
        ("bfloat16", 0.03, 0.19, False),
        ("bfloat16", 0.09, 0.29, True),  # 0.15 * (1 + |1|), however much noise
        ("bfloat16", 0.09, 0.31, False),
        ("bfloat16", 0.03, float("nan"), False),
    ],
)
def test_as_much_is_allowed_as_rounding_explains(client, computed_in, noise, off, passes):
    client(off, computed_in)
    if passes:
        assert f"{computed_in} on cpu" in check(noise)
    else:
        with pytest.raises(UserError, match="do not use this model"):
            check(noise)


@pytest.mark.parametrize(("computed_in", "noise"), [("float32", 2e-4), ("bfloat16", 0.11), ("bfloat16", float("nan"))])
def test_layouts_that_differ_by_more_than_rounding_are_refused_however_well_a_client_agrees(client, computed_in, noise):
    client(0.0, computed_in)
    with pytest.raises(UserError, match="between layouts of the same pairs"):
        check(noise)


@pytest.fixture(scope="module")
def saved(toy, tmp_path_factory):
    """A run's folder; what its proof found of the trainer's memory."""
    folder, found = tmp_path_factory.mktemp("proof") / "out", {}
    with pytest.MonkeyPatch.context() as patch:
        load, check = reward_modeling.load_reward_model, proof.check_reload

        def loading(*given, **named):
            found["model"], lines = load(*given, **named)
            return found["model"], lines

        def checking(*given, **named):
            found["weights"] = sum(p.numel() for p in found["model"].parameters())
            return check(*given, **named)

        patch.setattr(reward_modeling, "load_reward_model", loading)
        patch.setattr(proof, "check_reload", checking)
        reward_modeling.main(parse(Args, toy_flags(toy, folder, total_episodes=16)))
    return folder, found


def test_the_trainers_weights_are_gone_before_a_client_loads_its_own(saved):
    folder, found = saved
    assert found["weights"] == 0
    assert "reload check: 8 rewards" in json.dumps(json.loads((folder / "run.json").read_text())["notes"])


@pytest.mark.parametrize(("free", "device"), [(2**20, "cpu"), (2**40, "cuda")])
def test_a_client_computes_on_a_gpu_with_room_and_else_on_the_cpu(saved, monkeypatch, free, device):
    folder, _ = saved
    moved = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 2**40))
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, device: moved.append(device))
    found = proof.client_rewards(str(folder), [[5, 6, 7], [5, 6]])
    assert moved == (["cuda"] if device == "cuda" else [])
    assert len(found.one_by_one) == 2 and found.device == "cpu"  # it was not really moved
