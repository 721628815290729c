"""The dry run tells the truth: its numbers are a real run's, it needs no weights, and what it says fits is what arithmetic says."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, load_model, toy_flags
from hub_standin import TOKEN, USER, HubStandin
from huggingface_hub import HfApi
from transformers import AutoTokenizer

from open_rm import command_line
from open_rm.batching import attention
from open_rm.batching.layouts import lay_out_sequences
from open_rm.dry_run import alternatives, hours, hub_and_wandb, memory, sizes, steps, told
from open_rm.dry_run.target import Target
from open_rm.dry_run.telling import tell
from open_rm.errors import UserError
from open_rm.flags import AdapterFlags, Args, BatchFlags, ModelFlags, RunFlags
from open_rm.model.kernels import use_fastest
from open_rm.model.recompute import Saved
from open_rm.training import activations, ds_config, footprint
from open_rm.training.plan import Plan

GIB = 2**30
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
}
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
RANKS = 2


def args_of(flags: list, **more) -> Args:
    return dataclasses.replace(command_line.parse(Args, [str(flag) for flag in flags]), dry_run=True, **more)


def plan_of(folder) -> dict:
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((folder / "plan.json").read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def folder(toy, tmp_path_factory):
    """Folders of an 8B and a 70B that hold a config and a tokenizer, no weights."""
    made = tmp_path_factory.mktemp("models")
    for name, config in (("8b", LLAMA_8B), ("70b", LLAMA_70B)):
        (made / name).mkdir()
        for file in (toy / "model").iterdir():
            if file.suffix != ".safetensors" and file.name != "config.json":
                shutil.copy(file, made / name)
        (made / name / "config.json").write_text(json.dumps(config))
    return made


@pytest.fixture(scope="module")
def both(toy, nursery, tmp_path_factory):
    """A run of two ranks and its dry run: the run's folder and log, and the plan."""
    folder = tmp_path_factory.mktemp("both")
    more = {
        "max_token_length": 52,
        "max_prompt_token_length": 52,
        "total_episodes": None,
        "num_evals": 2,
        "checkpointing_steps": 100,
    }
    flags = toy_flags(toy, folder / "run", **more, deepspeed=REPOSITORY / "configs/ds/zero2.json")
    log = nursery.start(flags, folder / "log", processes=RANKS).finish()
    tell(args_of(flags, world_size=RANKS, output_dir=str(folder / "dry")))
    return folder / "run", log, plan_of(folder / "dry")


def test_steps_data_and_micro_batches_are_those_of_the_run(both):
    run, log, plan = both
    facts = json.loads((run / "run.json").read_text())
    steps = plan["steps"]
    assert facts["plan"] == {name: steps[name] for name in facts["plan"]}
    assert steps["all_dealt"] and steps["dealt_steps"] == list(range(1, facts["plan"]["total_steps"] + 1))
    assert steps["layout"] == facts["layout"]
    assert steps["max_tokens_per_micro_batch"] == facts["max_tokens_per_micro_batch"]
    assert "filtered" in plan["data"]["lines"][0]
    for line in [*plan["data"]["lines"], *plan["checks"]]:
        assert line in log


def test_tokens_positions_and_balance_of_every_step_are_those_of_the_run(both):
    run, _, plan = both
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "perf/step_seconds" in row]
    tokens = [row["perf/tokens_per_second"] * row["perf/step_seconds"] for row in rows]
    distinct = [count * row["perf/distinct_token_fraction"] for count, row in zip(tokens, rows, strict=True)]
    positions = [count / (1 - row["perf/padding_fraction"]) for count, row in zip(distinct, rows, strict=True)]
    steps = plan["steps"]
    for name, measured in (("tokens", tokens), ("distinct", distinct), ("positions", positions)):
        assert steps[f"{name}_per_step"] == pytest.approx(np.mean(measured), rel=1e-9), name
    imbalances = [row["perf/rank_imbalance"] for row in rows]
    assert steps["imbalance_median"] == pytest.approx(np.median(imbalances), rel=1e-9)
    assert steps["imbalance_worst"] == pytest.approx(max(imbalances), rel=1e-9)
    assert plan["hours"]["distinct_tokens"] == pytest.approx(sum(distinct), rel=1e-9)
    flops = rows[-1]["perf/total_flops"]
    assert plan["hours"]["flops_per_token"] * sum(distinct) == pytest.approx(flops, rel=1e-6)


def test_checkpoints_and_the_final_model_have_the_size_that_was_said(both):
    run, log, plan = both
    said = f"{plan['disk']['checkpoint_bytes'] / 2**20:.1f} MiB each"
    assert said in log
    [checkpoint] = (run / "checkpoints").glob("step_*")
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    assert plan["disk"]["checkpoint_bytes"] == pytest.approx(size, rel=0.02)  # random states and headers
    assert plan["disk"]["model_bytes"] == pytest.approx((run / "model.safetensors").stat().st_size, rel=0.01)


def test_a_rate_is_taken_from_a_run_and_scaled_by_flops_for_another_model(both, toy, folder):
    run, _, plan = both
    rate = hours.rate_of(Args(dry_run=True, tokens_per_second=str(run)))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [
        row["perf/tokens_per_second"] * row["perf/distinct_token_fraction"] * row["perf/rank_imbalance"] / RANKS
        for row in rows
        if "perf/tokens_per_second" in row
    ]
    assert min(rates) <= rate.tokens <= max(rates) and f"on {RANKS} devices" in rate.said
    # a token's FLOPs follow the run's own count, short of attention, which depends on lengths
    assert rate.flops == pytest.approx(plan["hours"]["flops_per_token"], rel=0.1)
    args = args_of(toy_flags(toy, run.parent / "other", model_name_or_path=folder / "8b"), tokens_per_second=str(run))
    tell(dataclasses.replace(args, world_size=RANKS, device_memory_gib=80.0))
    other = plan_of(run.parent / "other")["hours"]
    scaled = rate.tokens * rate.flops / other["flops_per_token"]
    assert other["tokens_per_second_per_device"] == pytest.approx(scaled, rel=1e-9)
    assert other["training_hours"] == pytest.approx(other["distinct_tokens"] / scaled / RANKS / 3600, rel=0.1)


@pytest.mark.parametrize(
    ("given", "what"),
    [("fast", "neither a number nor the folder"), ("-3", "above 0"), ("nan", "above 0"), ("inf", "above 0")],
)
def test_a_rate_that_is_none_is_one_sentence(given, what):
    with pytest.raises(UserError, match=f"--tokens_per_second {given}: .*{what}"):
        hours.rate_of(Args(dry_run=True, tokens_per_second=given))


# ---------------------------------------------------------------- without weights


def test_sixty_four_gpus_are_planned_without_weights_and_a_run_in_the_folder_is_not_touched(
    toy, folder, tmp_path, capsys
):
    flags = toy_flags(toy, tmp_path / "run", model_name_or_path=folder / "8b", total_episodes=None)
    (tmp_path / "run").mkdir()
    held = tmp_path / "run" / "run.json"
    held.write_text('{"finished": false, "run_name": "mine"}')
    tell(args_of(flags, world_size=64, device_memory_gib=80.0, deepspeed=str(REPOSITORY / "configs/ds/zero3.json")))
    plan, text = plan_of(tmp_path / "run"), capsys.readouterr().out
    assert held.read_text() == '{"finished": false, "run_name": "mine"}'
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["plan.json", "run.json"]
    assert "goes on with it" in text and plan["output_dir"]["state"] == "begun"
    assert plan["planned_for"]["devices"] == 64 and plan["planned_for"]["dtype"] == "bfloat16"
    # Llama 3.1 8B has 8,030,261,248 weights; the language-model head goes, the score head comes
    assert plan["model"]["parameters"] == 8_030_261_248 - 128_256 * 4096 + 4096
    assert plan["steps"]["pairs_per_step"] == 512 and plan["memory"]["fits"]
    assert "not known: pass --tokens_per_second" in text and plan["hours"]["hours"] is None
    assert len(text.splitlines()) <= 60
    documented = (REPOSITORY / "docs/dry_run.md").read_text()
    for section, numbers in plan.items():
        assert f"`{section}`" in documented, section
        rows = numbers if isinstance(numbers, list) else [numbers]
        for key in {key for row in rows if isinstance(row, dict) for key in row}:
            assert f"`{key}`" in documented, f"{section}.{key}"
    # and the other way: each key that the page names is there, null where nothing is known
    for bullet in documented.partition("## plan.json")[2].split("\n- ")[1:]:
        section, *keys = [name for name in re.findall(r"`(\w+)`", bullet) if name != "null"]
        rows = plan[section] if isinstance(plan[section], list) else [plan[section]]
        for row in rows:
            missing = set(keys) - set(row) if isinstance(row, dict) else set()
            assert not missing, f"{section}: {missing}"


def test_of_several_processes_the_first_one_speaks(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    tell(args_of(toy_flags(toy, tmp_path / "run")))
    assert capsys.readouterr().out == "" and not (tmp_path / "run").exists()


def planned_model(name, adapter=None, dtype=torch.bfloat16, **flags) -> sizes.Planned:
    tokenizer = AutoTokenizer.from_pretrained(name)
    how = {"adapter": adapter or AdapterFlags(), "dtype": dtype, "on_gpu": dtype == torch.bfloat16}
    return sizes.planned(ModelFlags(model_name_or_path=str(name), **flags), tokenizer, **how)


@pytest.mark.parametrize(
    "flags", [{}, {"freeze_backbone": True}, {"use_peft": True, "lora_r": 4}], ids=["whole", "head", "lora"]
)
def test_sizes_from_the_config_are_those_of_the_loaded_model(toy, tokenizer, flags):
    from open_rm.model.loading import load_reward_model

    frozen = {name: value for name, value in flags.items() if name == "freeze_backbone"}
    adapter = AdapterFlags(**{name: value for name, value in flags.items() if name not in frozen})
    tokenizer.add_tokens(["<one more>"])
    if not flags:  # a new token's embedding is trained
        how = {"adapter": adapter, "dtype": torch.float32, "on_gpu": False}
        found = sizes.planned(ModelFlags(model_name_or_path=str(toy / "model")), tokenizer, **how)
    else:
        found, tokenizer = (
            planned_model(toy / "model", adapter, torch.float32, **frozen),
            AutoTokenizer.from_pretrained(toy / "model"),
        )
    model, _ = load_reward_model(
        ModelFlags(model_name_or_path=str(toy / "model"), **frozen), tokenizer, adapter=adapter
    )
    assert found.sizes == footprint.sizes_of(model)


# ---------------------------------------------------------------- memory


def fitted(model, memory_gib, ranks, file, *, largest=4096, share=4096, every=None) -> memory.Fitted:
    target = Target(ranks, 1, True, torch.bfloat16, int(memory_gib * GIB), None, [])
    flags = BatchFlags(deepspeed=str(REPOSITORY / "configs/ds" / file), gradient_checkpointing=every or "auto")
    config = ds_config.fill_config(flags, width=model.model.width, bf16=True, max_grad_norm=1.0, world_size=ranks)
    needs = memory.needs(flags, model, "shared_prefix", target, keys=1.0, budget=largest, largest=largest)
    return memory.fitted(needs, model, config, "adamw", target, share=share)


@pytest.mark.parametrize("ranks", [8, 64])
def test_an_8b_under_zero3_is_the_published_arithmetic(folder, ranks):
    """Within 10 % of 16 bytes a weight divided by the devices (ZeRO, arXiv 1910.02054, section 3), and of DeepSpeed's own
    estimator, which counts 18 (its gradients are kept in float32, as ours) and the largest layer's gathered weights beside."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    model = planned_model(folder / "8b")
    state = fitted(model, 80, ranks, "zero3.json").state
    of_state = sum(state[name] for name in ("weights", "masters", "gradients", "moments"))
    sixteen = 16 * model.parameters / ranks
    # 2 bytes more a weight: the paper counts gradients in 16 bits
    assert of_state - 2 * model.parameters / ranks == pytest.approx(sixteen, rel=0.10)
    _, theirs, largest = estimate_zero3_model_states_mem_needs(
        model.parameters,
        model.largest,
        num_gpus_per_node=8,
        num_nodes=ranks // 8,
        cpu_offload=False,
        cpu_offload_params=False,
    )
    assert of_state == pytest.approx(theirs - largest, rel=0.10)


def test_activations_of_an_8b_are_those_counted_by_hand(folder):
    """137 KiB a token and layer with Liger and flash attention, counted tensor by tensor; the last layer keeps less."""
    model = planned_model(folder / "8b")
    how = {"itemsize": 2, "on_gpu": True, "keys": 1.0, "reads_last": False}
    kept = activations.of_model(model.model.classifier, "packed", **how)
    assert kept.kept / 32 / 1024 == pytest.approx(137, rel=0.02) and kept.passed == 8192
    assert activations.of_model(model.model.classifier, "packed", **how | {"reads_last": True}).kept < kept.kept


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_the_formula_of_activations_is_what_a_forward_keeps(toy, tokenizer, layout):
    """Within 5 %: a float32 for each head and norm is not in the formula."""
    model = load_model(toy / "model", tokenizer, layout=layout)
    use_fastest(model, torch.device("cpu"), layout, float8=False)
    batch = lay_out_sequences(layout, [[5 + i % 90 for i in range(251)]], pad_token_id=0, prompt_of=[0])
    with Saved(251) as saved:
        model(**batch.inputs(torch.device("cpu")))
    planned = planned_model(toy / "model", dtype=torch.float32)
    how = {"itemsize": 4, "on_gpu": False, "keys": 1.0, "reads_last": bool(planned.model.read_only_parameters)}
    assert attention.NAME and how["reads_last"]
    found = activations.of_model(planned.model.classifier, layout, **how)
    assert found.known and found.kept == pytest.approx(saved.per_token, rel=0.05)


@pytest.mark.parametrize(
    ("on_gpu", "keys", "told_as"),
    [(False, 3.0, "MAY NOT FIT"), (False, 1.0, "DOES NOT FIT"), (True, 3.0, "DOES NOT FIT")],
)
def test_keys_that_a_cpu_need_not_copy_are_a_bound_and_said_as_one(folder, on_gpu, keys, told_as):
    model, target = planned_model(folder / "8b"), Target(1, 1, on_gpu, torch.float32, 8 * GIB, None, [])
    needs = memory.needs(BatchFlags(), model, "shared_prefix", target, keys=keys, budget=4096, largest=4096)
    flags = {"width": model.model.width, "bf16": False, "max_grad_norm": 1.0, "world_size": 1}
    found = memory.fitted(needs, model, ds_config.fill_config(BatchFlags(), **flags), "adamw", target)
    lines = memory.told(found, needs).lines
    assert lines[0].endswith(f": {told_as}") and found.at_most == (told_as == "MAY NOT FIT")
    assert (" at the peak at most: " in lines[0]) == (" a position at most, " in lines[-1]) == found.at_most
    table = alternatives.told([alternatives.Alternative("zero0.json", found)], model, "adamw").lines
    assert table[1].split()[1] == ("maybe" if found.at_most else "no")
    assert table[2].startswith("none surely fits: " if found.at_most else "none fits: ")


def options(model, memory_gib, ranks, **how) -> tuple[dict[str, bool | None], str | None]:
    target = Target(ranks, 1, True, torch.bfloat16, int(memory_gib * GIB), None, [])
    needs = memory.needs(BatchFlags(), model, "shared_prefix", target, keys=1.0, budget=4096, largest=4096)
    found = alternatives.alternatives(BatchFlags(), needs, model, "adamw", target, share=4096, adapter=AdapterFlags())
    best = alternatives.recommended(found)
    return {one.file: one.found and one.found.fits for one in found}, best and best.file


def test_what_fits_is_what_arithmetic_says(folder):
    small, large = planned_model(folder / "8b"), planned_model(folder / "70b")
    fits, best = options(small, 80, 64)
    assert fits["zero2.json"] and fits["zero3.json"] and best == "zero2.json"
    assert fits["zero0.json"] is None  # bfloat16 on several devices is stage 2 anyway
    fits, best = options(small, 24, 1)
    assert not any(fits[file] for file in ("zero0.json", "zero2.json", "zero3.json"))  # 16 bytes a weight: 112 GiB
    fits, best = options(large, 80, 8)  # 18 x 69.5 B / 8 = 146 GiB a device
    assert not fits["zero2.json"] and not fits["zero3.json"] and best == "zero3_offload.json"
    fits, best = options(large, 80, 64)  # 18 GiB a device and activations; ZeRO 2 has 130 GiB of weights
    assert not fits["zero2.json"] and fits["zero3.json"] and best in ("zero3.json", "zero3_hpz.json")


def test_a_second_copy_in_each_node_costs_its_share_of_the_weights(folder):
    model = planned_model(folder / "8b")
    plain, copied = (fitted(model, 80, 64, file) for file in ("zero3.json", "zero3_hpz.json"))
    assert copied.peak - plain.peak == pytest.approx(2 * model.parameters / 8, rel=1e-6)


def test_devices_that_compute_a_sequence_together_hold_their_share_of_its_activations(folder):
    model = planned_model(folder / "8b")
    flags, how = BatchFlags(), {"keys": 1.0, "budget": 8192, "largest": 8192}
    one, four = (
        memory.needs(flags, model, "packed", Target(64, group, True, torch.bfloat16, 80 * GIB, None, []), **how)
        for group in (1, 4)
    )
    assert four.largest == math.ceil(one.largest / 4)


# ---------------------------------------------------------------- what the review of the dry run found


@pytest.mark.parametrize("ranks", [12, 20, 36])
def test_devices_that_one_file_cannot_divide_are_planned_with_the_others(folder, ranks):
    target = Target(ranks, 1, True, torch.bfloat16, 80 * GIB, None, [])
    model = planned_model(folder / "8b")
    needs = memory.needs(BatchFlags(), model, "shared_prefix", target, keys=1.0, budget=4096, largest=4096)
    found = alternatives.alternatives(BatchFlags(), needs, model, "adamw", target, share=4096, adapter=AdapterFlags())
    without = {one.file: one.why_not for one in found if one.found is None}
    assert f'"zero_hpz_partition_size" is 8, which does not divide the {ranks} devices' in without["zero3_hpz.json"]
    assert alternatives.recommended(found) is not None and "zero3.json" not in without


def test_a_run_predicts_its_own_seconds(tmp_path, folder):
    """Steps of 2 s on 4 devices, in which the slowest has half again the mean's work: ten more take 20 s."""
    distinct, imbalance, seconds = 5000, 1.5, 2.0
    rows = [
        {
            "step": step,
            "perf/tokens_per_second": 2 * distinct / seconds,
            "perf/distinct_token_fraction": 0.5,
            "perf/rank_imbalance": imbalance,
            "perf/step_seconds": seconds,
            "perf/total_flops": 1.0 * step,
        }
        for step in range(1, 11)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.json").write_text('{"world_size": 4}')
    rate = hours.rate_of(Args(dry_run=True, tokens_per_second=str(tmp_path)))
    assert rate.flops == pytest.approx(1 / distinct)
    rate = dataclasses.replace(rate, flops=None)
    each = dict.fromkeys(("pairs", "tokens", "positions", "forwards", "seconds", "area", "read"), [0] * 10)
    dealt = steps.Dealt(
        list(range(10)), distinct=[distinct] * 10, imbalance=[imbalance] * 10, largest=0, share=0, **each
    )
    plan = Plan(80, 8, 80, total_steps=10, warmup_steps=0, evaluation_steps=(), seed=1, grouped=False)
    target = Target(4, 1, True, torch.bfloat16, 80 * GIB, None, [])
    said = hours.told(rate, plan, dealt, planned_model(folder / "8b"), target, evaluated=0)
    assert said.numbers["training_hours"] * 3600 == pytest.approx(10 * seconds)


def test_a_record_whose_lines_are_no_rows_is_one_sentence(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("[1,2]\n")
    (tmp_path / "run.json").write_text('{"world_size": 4}')
    with pytest.raises(UserError, match="are not those of a run"):
        hours.rate_of(Args(dry_run=True, tokens_per_second=str(tmp_path)))


def test_adafactor_is_asked_of_the_planned_gpus_and_not_of_this_machine(toy, tmp_path):
    flags = toy_flags(toy, tmp_path / "run", optim="adafactor")
    with pytest.raises(UserError, match="--optim adafactor needs whole matrices, and bfloat16"):
        tell(args_of(flags, device_memory_gib=80.0))
    assert not (tmp_path / "run").exists()


def test_what_this_machine_refuses_is_said_last_and_ends_a_plan_for_it_alone(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("open_rm.reliability.checkpoints.free_bytes", lambda path: 0)
    monkeypatch.setattr("open_rm.dry_run.hub_and_wandb.get_token", lambda: None)
    monkeypatch.setattr("open_rm.dry_run.hub_and_wandb.constants.HF_HUB_OFFLINE", False)
    args = args_of(toy_flags(toy, tmp_path / "run", push_to_hub=True))
    with pytest.raises(UserError, match="too little for the checkpoints.*--push_to_hub: there is no Hub token"):
        tell(args)
    alone = capsys.readouterr().out
    tell(dataclasses.replace(args, device_memory_gib=80.0))
    for text in (alone, capsys.readouterr().out):
        assert text.count("the run would be refused: ") == 2 and "free on this machine" in text
        assert "the run would be refused: " in text.splitlines()[-2]
    assert len(plan_of(tmp_path / "run")["refusals"]) == 2


@pytest.fixture
def copied(both, tmp_path):
    """A copy of the run that `both` made, and its flags."""
    run, _, _ = both
    shutil.copytree(run, tmp_path / "run")
    facts = json.loads((run / "run.json").read_text())
    known = {field.name for field in dataclasses.fields(Args)}
    flags = {name: value for name, value in facts.items() if name in known}
    return Args(**flags | {"dry_run": True, "world_size": RANKS, "output_dir": str(tmp_path / "run")})


def test_a_finished_run_is_gone_on_with_by_its_own_flags_alone(copied, capsys):
    tell(copied)
    assert "holds a finished run: the same command would do nothing" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"cannot be gone on with by this command.*--learning_rate 0.001 -> 0.01"):
        tell(dataclasses.replace(copied, learning_rate=0.01))
    assert plan_of(Path(copied.output_dir))["output_dir"]["state"] == "occupied"
    assert "would do nothing" not in capsys.readouterr().out
    with pytest.raises(UserError, match="already holds a model"):
        tell(dataclasses.replace(copied, resume_from_checkpoint="never"))


def test_a_begun_run_is_gone_on_with_on_its_own_data_alone(copied, capsys):
    folder = Path(copied.output_dir)
    facts = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(facts | {"finished": False}))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    tell(copied)
    assert "the same command goes on with it" in capsys.readouterr().out
    with pytest.raises(UserError, match="training data differ from those that it was begun with"):
        tell(dataclasses.replace(copied, max_token_length=40, max_prompt_token_length=40))
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_without_a_folder_dry_runs_share_one(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = toy_flags(toy, tmp_path / "run", dataset_local_cache_dir=tmp_path / "cache")
    place = flags.index("--output_dir")
    args = args_of([*flags[:place], *flags[place + 2 :]])
    tell(args)
    tell(args)
    assert [path.name for path in (tmp_path / "output").iterdir()] == [f"{args.exp_name}__{args.seed}__dry_run"]
    assert "the run makes a folder of its own" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("optim", "frozen", "gib"), [("adamw", True, 14.0), ("adamw", False, 125.8), ("adamw_8bit", False, 84.1)]
)
def test_the_hosts_hold_what_offloading_moves(folder, optim, frozen, gib):
    """An 8B of 7,504,928,768 weights: 2 bytes of a frozen one; 2 + 4 + 4 + 8 of a trained one, or 2.03 for the moments."""
    model = planned_model(folder / "8b", freeze_backbone=frozen)
    assert alternatives.host_bytes(model, optim) / GIB == pytest.approx(gib, rel=0.005)


def test_the_table_names_the_positions_of_the_peak_the_limit_and_the_nodes(folder):
    model, target = planned_model(folder / "8b"), Target(64, 1, True, torch.bfloat16, 80 * GIB, None, [])
    needs = memory.needs(BatchFlags(), model, "shared_prefix", target, keys=1.0, budget=4096, largest=4096)
    how = {"share": 5000, "adapter": AdapterFlags()}
    found = alternatives.alternatives(BatchFlags(), needs, model, "adamw", target, **how)
    head, *lines = alternatives.told(found, model, "adamw").lines
    assert head.split()[1:] == ["fits", "peak", "of", "positions", "computed", "again", "limit"]
    [row] = [line for line in lines if line.startswith("zero3_hpz.json")]
    assert "5,000" in row and row.endswith("nodes of 8")
    few = [one for one in found if one.file == "zero0.json"]
    assert not any("of the hosts' memory" in line for line in alternatives.told(few, model, "adamw").lines)
    assert alternatives.told(few, model, "adamw").lines[-1] == "none goes with these flags"


def test_sizes_and_counts_read_as_a_person_writes_them():
    assert (told.size(2660), told.size(3 * 2**20), told.size(14 * GIB)) == ("2.60 KiB", "3.00 MiB", "14.0 GiB")
    assert (told.counted(1, "step"), told.counted(1200, "step")) == ("1 step", "1,200 steps")


@pytest.fixture(scope="module")
def standin():
    with HubStandin() as hub:
        yield hub


@pytest.fixture
def said_by_the_hub(standin, monkeypatch):
    """What a dry run says of a push to a repository, by a token."""

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def say(repo, token=TOKEN):
        monkeypatch.setattr(hub_and_wandb, "HfApi", lambda: HfApi(endpoint=standin.endpoint, token=token))
        monkeypatch.setattr(hub_and_wandb, "get_token", lambda: token)
        return hub_and_wandb.hub(RunFlags(push_to_hub=True, hf_repo_id=repo), "name")

    yield say
    standin.clear()


def test_the_hub_is_asked_whose_the_token_is_and_whether_the_repository_exists(standin, said_by_the_hub):
    HfApi(endpoint=standin.endpoint, token=TOKEN).create_repo("there", private=True)
    made = len(standin.requests())
    there, missing = said_by_the_hub("there"), said_by_the_hub("missing")
    assert there.numbers["user"] == USER and there.numbers["repo_exists"] is True and not there.refused
    assert f"pushes to {USER}/there, branch name: the token is {USER}'s, which exists" in there.lines[0]
    assert "will be made, unless it is another's private one" in missing.lines[0] and not missing.refused
    assert {method for method, _, _ in standin.requests()[made:]} <= {"GET", "HEAD"}


def test_a_hub_that_says_no_or_nothing_is_one_clause(standin, said_by_the_hub, monkeypatch):
    refused = said_by_the_hub("one", token="hf_wrong")
    assert refused.refused == ("--push_to_hub: the Hub refuses the token (401); check HF_TOKEN",)
    [sentence] = said_by_the_hub("a name").refused
    assert "not a name that the Hub accepts" in sentence
    standin.fault("whoami", status=500)
    assert "500" in said_by_the_hub("one").lines[0]
    monkeypatch.setattr(hub_and_wandb, "SECONDS", 0.2)
    standin.fault("whoami", hang=2)
    silent = said_by_the_hub("one")
    assert "did not answer within 0 s" in silent.lines[0] and not silent.refused
    standin.clear()
    monkeypatch.setattr(hub_and_wandb, "SECONDS", 8.0)
    monkeypatch.setattr(HfApi, "whoami", lambda self: {})
    assert "its answer is not understood (KeyError: 'name')" in said_by_the_hub("one").lines[0]
