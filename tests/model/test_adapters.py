"""LoRA and QLoRA: the head is trained in full and saved, and both folders give plain peft and transformers our rewards."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import REPOSITORY, load_model, read_metrics, toy_flags
from safetensors.torch import load_file

from open_rm.batching.rules import LAYOUTS
from open_rm.checks import check_args
from open_rm.errors import UserError
from open_rm.flags import AdapterFlags, Args, ModelFlags
from open_rm.model import adapters
from open_rm.model.loading import load_reward_model
from open_rm.model.reward_model import ScoreHead, head_of, model_shape
from open_rm.publishing.pushing import check_folder

LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "total_episodes": 48, "learning_rate": "5e-3"}
# After six steps: the reloaded rewards against the trainer's, absolute, at rewards of about 1. Merged 4-bit weights are
# unpacked to float32, and the tolerance is float32's; a client of the adapter computes in bfloat16 on some CPUs.
TOLERANCE, PACKED_TOLERANCE = 1e-4, 2e-2


@pytest.fixture(scope="module")
def runs(toy, tmp_path_factory, run_forked):
    """Output folder and log of a run, by its flags."""
    folder, found = tmp_path_factory.mktemp("adapters"), {}

    def run(**changes):
        key = json.dumps(changes, sort_keys=True, default=str)
        if key not in found:
            output = folder / str(len(found))
            done = run_forked(*toy_flags(toy, output, **(LORA | changes)))
            assert done.returncode == 0, done.stderr[-3000:]
            found[key] = output, done.stdout
        return found[key]

    return run


@pytest.mark.parametrize("packed", [False, True], ids=["lora", "qlora"])
@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "merged"])
def test_the_folder_gives_plain_clients_the_trainers_rewards(runs, packed, merged):
    output, log = runs(load_in_4bit=packed, merge_adapter=merged)
    found = re.search(r"reload check: .*largest difference ([\d.e+-]+), (\S+) on ", log)
    assert found[2] == ("4-bit" if packed and not merged else "float32")
    assert float(found[1]) < (TOLERANCE if found[2] == "float32" else PACKED_TOLERANCE)
    assert "score head in full" in log
    assert (output / "adapter_config.json").is_file() != merged
    assert (output / "model.safetensors").is_file() == merged
    weights = load_file(output / ("model.safetensors" if merged else "adapter_model.safetensors"))
    [head] = [value for name, value in weights.items() if name.endswith("score.weight")]
    start = torch.empty(1, 128).normal_(std=1 / 129**0.5, generator=torch.Generator().manual_seed(1))
    assert head.shape == (1, 128) and (head - start).abs().max() > 1e-3  # it has moved from its initial value
    if merged:
        plain = transformers.AutoModelForSequenceClassification.from_pretrained(output)
        assert (plain.config.num_labels, plain.config.problem_type) == (1, "regression")
        assert getattr(plain.config, "quantization_config", None) is None
    else:
        assert {name.split(".")[-2] for name in weights} == {"lora_A", "lora_B", "score"}
        assert (output / "adapter_model.safetensors").stat().st_size < 300_000


@pytest.mark.parametrize("base", ["lora", "qlora", "lora beside bfloat16"])
def test_the_code_on_the_card_gives_the_reward(runs, base, toy, tmp_path):
    packed = base == "qlora"
    changes = {"load_in_4bit": packed, "merge_adapter": False}
    if base == "lora beside bfloat16":  # stored so, trained in float32
        shutil.copytree(toy / "model", tmp_path / "base")
        stored = transformers.AutoModelForCausalLM.from_pretrained(toy / "model", dtype="bfloat16")
        stored.save_pretrained(tmp_path / "base")
        changes["model_name_or_path"] = tmp_path / "base"
    output, log = runs(**changes)
    code = re.search(r"```python\n(.*?)```", (output / "README.md").read_text(), re.DOTALL)[1]
    messages = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    script = f"messages = {messages!r}\n{code}\nprint('REWARD', reward)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    reward = float(re.search(r"REWARD (\S+)", done.stdout)[1])
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    how = {
        "pad_token_id": tokenizer.pad_token_id,
        "dtype": "float32",
        "load_in_4bit": packed,
        "trust_remote_code": False,
    }
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    assert reward == pytest.approx(adapters.load(str(output), **how)(input_ids=ids).logits.item(), abs=1e-5)


def test_training_lowers_the_loss_and_the_backbone_does_not_move(runs, toy):
    output, _ = runs(load_in_4bit=False, merge_adapter=True, learning_rate="1e-3", total_episodes=160)
    before = transformers.AutoModelForCausalLM.from_pretrained(toy / "model").state_dict()
    after = load_file(output / "model.safetensors")
    for name, weight in before.items():
        if "norm" in name or "embed" in name:
            assert torch.equal(weight, after[name]), name
    adapted = [name for name in before if "proj" in name]
    assert adapted and all(not torch.equal(before[name], after[name]) for name in adapted)
    evaluations = [row["eval/rm/loss"] for row in read_metrics(output) if "eval/rm/loss" in row]
    assert evaluations[-1] < evaluations[0]


@pytest.mark.parametrize("packed", [False, True], ids=["lora", "qlora"])
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "padded"])
def test_layouts_give_the_same_run(runs, packed, layout):
    changes = {"load_in_4bit": packed, "num_evals": 0, "learning_rate": "1e-3"}
    reference, other = (read_metrics(runs(**changes, batching=name)[0]) for name in ("padded", layout))
    losses = [[row["train/rm/loss"] for row in rows if "train/rm/loss" in row] for rows in (reference, other)]
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.parametrize(
    ("stage", "processes", "packed"),
    [("zero2", 2, False), ("zero3", 1, False), ("zero3", 2, False), ("zero2", 2, True)],
)
def test_zero_stages_and_processes_give_the_same_run(runs, stage, processes, packed, toy, tmp_path, run_forked):
    changes = {"load_in_4bit": packed, "num_evals": 0, "learning_rate": "1e-3"}
    reference = read_metrics(runs(**changes, batching="padded")[0])
    flags = LORA | changes | {"deepspeed": f"configs/ds/{stage}.json", "per_device_train_batch_size": 8 // processes}
    done = run_forked(*toy_flags(toy, tmp_path / "out", **flags), processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [
        [row["train/rm/loss"] for row in rows if "train/rm/loss" in row]
        for rows in (reference, read_metrics(tmp_path / "out"))
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    head = load_file(tmp_path / "out" / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert head.shape == (1, 128)  # not the empty stand-in of stage 3


def test_a_merged_folder_of_stage_3_has_the_weights_of_none(runs, toy, tmp_path, run_forked):
    changes = {"num_evals": 0, "learning_rate": "1e-3", "merge_adapter": True}
    plain, _ = runs(**changes, load_in_4bit=False, batching="padded")
    flags = LORA | changes | {"deepspeed": "configs/ds/zero3.json", "per_device_train_batch_size": 4}
    done = run_forked(*toy_flags(toy, tmp_path / "out", **flags), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "reload check" in done.stdout
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", plain))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        # Adam divides by the root of a squared gradient: rounding moves small gradients' steps, six of 1e-3
        assert torch.allclose(ours[name], weight, atol=2e-5), name


@pytest.mark.parametrize("stage", ["zero0", "zero2", "zero3"])
def test_bfloat16_works_under_every_stage(toy, tmp_path, stage, run_forked):
    flags = LORA | {"total_episodes": 16, "dtype": "bfloat16", "deepspeed": f"configs/ds/{stage}.json"}
    done = run_forked(*toy_flags(toy, tmp_path / "out", **flags, gradient_checkpointing=True))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "reload check" in done.stdout


@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "merged"])
def test_a_base_without_a_pad_token_is_reloaded(toy, tmp_path, merged, run_forked):
    """As Llama-3: the pad is new, its row is not in the adapter and never read."""
    base = tmp_path / "base"
    shutil.copytree(toy / "model", base)
    config = json.loads((base / "tokenizer_config.json").read_text())
    config["pad_token"] = None
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    done = run_forked(*toy_flags(toy, tmp_path / "out", **LORA | {"model_name_or_path": base, "merge_adapter": merged}))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "reload check" in done.stdout
    if not merged:
        assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_size < 300_000


def test_a_folder_with_an_adapter_is_one_that_can_be_pushed(runs):
    output, _ = runs(load_in_4bit=False, merge_adapter=False)
    check_folder(str(output))


def test_all_linear_layers_are_adapted_but_the_head(toy, tokenizer):
    reward_model = load(toy / "model", tokenizer)
    adapted = {name.rpartition(".")[0] for name, _ in reward_model.named_parameters() if "lora_A" in name}
    assert len(adapted) > 0 and not any("score" in name for name in adapted)
    trained = {name for name, p in reward_model.named_parameters() if p.requires_grad and "lora" not in name}
    assert trained == {"classifier.score.modules_to_save.default.weight"}
    assert isinstance(reward_model.head, ScoreHead)
    assert model_shape(reward_model).passes == 2
    plain = load_model(toy / "model", tokenizer)
    # B starts at zero: before training the rewards are those without an adapter
    ids = torch.tensor([[5, 6, 7, 8]])
    where = {"reward_index": torch.tensor([3]), "read_index": torch.tensor([3]), "attention_mask": torch.ones(1, 4)}
    assert torch.equal(reward_model(input_ids=ids, **where), plain(input_ids=ids, **where))


def test_the_head_is_the_copy_that_peft_trains_and_the_one_it_was_made_of_stays(toy, tokenizer):
    reward_model = load(toy / "model", tokenizer)
    wrapper = reward_model.classifier.score
    assert head_of(reward_model.classifier) is reward_model.head is wrapper.modules_to_save["default"]
    assert reward_model.head is not wrapper.original_module
    assert reward_model.head.weight.requires_grad and not wrapper.original_module.weight.requires_grad
    plain = load_model(toy / "model", tokenizer)
    assert torch.equal(reward_model.head.weight, plain.head.weight)


def test_evaluating_does_not_change_the_gradients_of_four_bit_weights(toy, tokenizer):
    reward_model = load(toy / "model", tokenizer, load_in_4bit=True)
    for name, parameter in reward_model.named_parameters():
        if "lora_B" in name:  # at zero, A would have no gradient
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(1))
    where = {"reward_index": torch.tensor([3]), "read_index": torch.tensor([3]), "attention_mask": torch.ones(1, 4)}
    results = []
    for _ in range(2):
        reward_model.train()
        reward_model.zero_grad()
        reward = reward_model(input_ids=torch.tensor([[5, 6, 7, 8]]), **where)
        reward.sum().backward()
        results.append([reward.detach(), *(p.grad for p in reward_model.parameters() if p.requires_grad)])
        reward_model.eval()
        with torch.no_grad():
            assert torch.equal(reward_model(input_ids=torch.tensor([[5, 6, 7, 8]]), **where), reward)
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_four_bit_weights_are_counted_whole(toy, tokenizer):
    packed = load(toy / "model", tokenizer, load_in_4bit=True)
    plain = load(toy / "model", tokenizer)
    assert model_shape(packed).body_parameters == model_shape(plain).body_parameters


def test_targets_that_are_no_linear_layer_are_refused_by_name(toy, tokenizer):
    with pytest.raises(
        UserError, match="--lora_target_modules nothing: no linear layer of the backbone; it has down_proj"
    ):
        load(toy / "model", tokenizer, lora_target_modules=["q_proj", "nothing"])


def test_a_reward_token_that_is_new_to_the_model_is_refused(toy, tmp_path, run_forked):
    done = run_forked(*toy_flags(toy, tmp_path / "out", **LORA, reward_token="<|new|>"))
    assert done.returncode == 1
    assert "the token <|new|> is new to the model, and with --use_peft or --freeze_backbone its" in done.stderr


def load(folder, tokenizer, **flags):
    """The model with an adapter beside it."""
    adapter = AdapterFlags(use_peft=True, lora_r=4, lora_alpha=8.0, **flags)
    model, _ = load_reward_model(ModelFlags(model_name_or_path=str(folder)), tokenizer, adapter=adapter)
    return model


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"lora_r": 8}, "--lora_r does nothing without --use_peft"),
        ({"load_in_4bit": True}, "--load_in_4bit does nothing without --use_peft"),
        ({"merge_adapter": True}, "--merge_adapter does nothing without --use_peft"),
        ({"lora_target_modules": ["q_proj"]}, "--lora_target_modules does nothing without --use_peft"),
        ({"use_peft": True, "lora_r": 0}, "--lora_r 0: must be at least 1"),
        ({"use_peft": True, "lora_dropout": 1.0}, "--lora_dropout 1.0: must be from 0 to below 1"),
        ({"use_peft": True, "freeze_backbone": True}, "--freeze_backbone trains the head alone"),
        (
            {"use_peft": True, "load_in_4bit": True, "deepspeed": str(REPOSITORY / "configs/ds/zero3.json")},
            "--load_in_4bit and --deepspeed .*: ZeRO stage 3 cannot divide 4-bit weights",
        ),
    ],
)
def test_adapters_that_cannot_be_are_refused_by_name(wrong, sentence):
    with pytest.raises(UserError, match=sentence):
        check_args(Args(**wrong))
