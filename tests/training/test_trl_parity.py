"""The same training as TRL's RewardTrainer: same start, same pairs in the same order, same losses and weights.

TRL runs in a process of its own, because accelerate keeps one state per process and reads the environment of ranks.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED_DATA, in_a_process, read_metrics, read_pairs, run_recipe, shared_data, toy_flags
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification

from open_rm.batching.steps import draw_steps
from open_rm.data.pairs import PreferenceData
from open_rm.data.tokenizer import load_tokenizer

SEED, STEPS, PAIRS_PER_STEP = 1, 10, 8
# High enough to move the toy in ten steps, with gradient norms far above 1, so that clipping to 1 acts in every step.
# Three times as much is stable too, but the jump of its first step (there is no warm-up) triples all rounding.
LEARNING_RATE = 3e-4
# With 1e-8, AdamW's first steps divide gradients that are nearly 0 by themselves and blow their rounding up to lr.
EPS = 1e-5
# Losses and weights: float32 on both sides, only the order of sums differs (padding, micro-batches). Measured here:
# losses 2e-7, weights 1e-6 apart after ten steps.
TOLERANCE = 1e-5
# Relative, on the gradient norm: a loss that were summed or averaged differently would be off by a factor.
NORM_TOLERANCE = 1e-4
# TRL averages over batches what we average over pairs: the same number only if the batches are equally large.
TEST_PAIRS, EVAL_BATCH = 60, 20

PEER_TRAINS = """
import json, sys
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

start, folder, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
pairs = json.load(open(f"{folder}/pairs.json"))
out = {}
for norm in (0.0, 1.0):
    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(start, dtype="float32"),
        processing_class=AutoTokenizer.from_pretrained(start),
        train_dataset=Dataset.from_dict(pairs["train"]),
        eval_dataset=Dataset.from_dict(pairs["test"]),
        args=RewardConfig(
            output_dir=f"{folder}/{norm}", max_grad_norm=norm, lr_scheduler_type="constant", weight_decay=0.0,
            optim="adamw_torch", train_sampling_strategy="sequential", max_length=None, bf16=False, use_cpu=True,
            gradient_checkpointing=False, logging_steps=1, save_strategy="no", report_to="none", **settings,
        ),
    )
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    out[norm] = {name: [entry[name] for entry in steps] for name in ("loss", "grad_norm")} | trainer.evaluate()
    trainer.model.save_pretrained(f"{folder}/{norm}")
print(json.dumps(out))
"""

PEER_TOKENIZES = """
import json, sys
from datasets import Dataset
from transformers import AutoTokenizer
from trl import RewardConfig, RewardTrainer

model, folder, sources, tokenizers = *sys.argv[1:3], *map(json.loads, sys.argv[3:])
out = {}
for source in sources:
    rows = Dataset.from_list([json.loads(line) for line in open(f"{source}/train.jsonl")])
    for tokenizer in tokenizers:
        config = RewardConfig(output_dir=folder, max_length=None, bf16=False, use_cpu=True, report_to="none")
        prepared = RewardTrainer(
            model=model, args=config, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(tokenizer)
        ).train_dataset
        out.setdefault(source, {})[tokenizer] = [prepared["chosen_ids"][:], prepared["rejected_ids"][:]]
print(json.dumps(out))
"""


def encoded(folder: Path, split: str, tokenizer, cache_dir: Path) -> PreferenceData:
    # nothing is filtered: TRL has no limit on prompts
    unlimited = {"max_token_length": 100_000, "max_prompt_token_length": 100_000}
    mixer = [folder, "1.0"]
    return read_pairs(mixer, tokenizer, splits=[split], seed=SEED, dataset_local_cache_dir=str(cache_dir), **unlimited)


@dataclass(frozen=True)
class Peer:
    """What TRL made of our pairs. start: the reward model both begin with.  runs: by max_grad_norm ("0.0", "1.0")."""

    start: Path
    folder: Path
    runs: dict[str, dict]


@pytest.fixture(scope="module")
def peer(toy, tmp_path_factory) -> Peer:
    start, folder = tmp_path_factory.mktemp("start"), tmp_path_factory.mktemp("peer")
    tokenizer = load_tokenizer(str(toy / "model"))
    tokenizer.save_pretrained(start)
    # A checkpoint that has its head already: both sides keep it, so no initialisation can differ.
    torch.manual_seed(SEED)
    model = AutoModelForSequenceClassification.from_pretrained(
        toy / "model", num_labels=1, pad_token_id=tokenizer.pad_token_id
    )
    torch.nn.init.normal_(model.score.weight, std=(model.score.in_features + 1) ** -0.5)
    model.save_pretrained(start)

    data = {split: encoded(toy / "data", split, tokenizer, folder / "cache") for split in ("train", "test")}
    order = np.concatenate(list(draw_steps(len(data["train"]), PAIRS_PER_STEP, STEPS * PAIRS_PER_STEP, seed=SEED)))
    # The set decides whether TRL's average over batches is one over pairs.
    assert len(data["test"]) == TEST_PAIRS and TEST_PAIRS % EVAL_BATCH == 0
    pairs = {"train": data["train"].pairs(order), "test": data["test"].pairs(range(TEST_PAIRS))}
    columns = {
        split: {
            name: [pair[side].tolist() for pair in rows] for side, name in enumerate(("chosen_ids", "rejected_ids"))
        }
        for split, rows in pairs.items()
    }
    (folder / "pairs.json").write_text(json.dumps(columns))
    settings = {
        "learning_rate": LEARNING_RATE,
        "adam_epsilon": EPS,
        "max_steps": STEPS,
        "per_device_train_batch_size": PAIRS_PER_STEP,
        "per_device_eval_batch_size": EVAL_BATCH,
    }
    return Peer(start, folder, in_a_process(PEER_TRAINS, start, folder, json.dumps(settings)))


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (2, 4)])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_losses_weights_and_held_out_numbers_are_those_of_trl(toy, peer, tmp_path, max_grad_norm, batch, accumulation):
    out = tmp_path / "out"
    flags = toy_flags(
        toy,
        out,
        model_name_or_path=peer.start,
        dtype="float32",
        seed=SEED,
        lr_scheduler_type="constant",
        learning_rate=LEARNING_RATE,
        eps=EPS,
        weight_decay=0,
        max_grad_norm=max_grad_norm,
        total_episodes=STEPS * PAIRS_PER_STEP,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        per_device_eval_batch_size=EVAL_BATCH,
    )
    done = run_recipe(*flags, env={"CUDA_VISIBLE_DEVICES": ""})  # TRL computes on the CPU here, so we do
    assert done.returncode == 0, done.stderr
    assert "the checkpoint already is a reward model" in done.stdout

    lines, theirs = read_metrics(out), peer.runs[str(max_grad_norm)]
    ours = [line for line in lines if "train/rm/loss" in line]
    assert len(ours) == len(theirs["loss"]) == STEPS
    assert [line["train/rm/loss"] for line in ours] == pytest.approx(theirs["loss"], rel=0, abs=TOLERANCE)
    norms = [line["train/rm/grad_norm"] for line in ours]  # before clipping, on both sides
    assert norms == pytest.approx(theirs["grad_norm"], rel=NORM_TOLERANCE)

    weights = load_file(out / "model.safetensors")
    reference = load_file(peer.folder / str(max_grad_norm) / "model.safetensors")
    assert weights.keys() == reference.keys()
    for name, tensor in reference.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")

    held_out = [line for line in lines if "eval/rm/loss" in line][-1]
    assert held_out["episode"] == STEPS * PAIRS_PER_STEP
    assert held_out["eval/rm/loss"] == pytest.approx(theirs["eval_loss"], rel=0, abs=TOLERANCE)
    # Shares of 60 pairs are 1.7e-2 apart, so this says: the same pairs are right. TRL's mean is one of float32 numbers.
    assert held_out["eval/rm/accuracy"] == pytest.approx(theirs["eval_accuracy"], rel=0, abs=1e-6)


def test_the_parity_runs_would_notice_a_missing_clip_and_a_wrong_start(peer):
    free, clipped = (peer.runs[norm] for norm in ("0.0", "1.0"))
    assert min(clipped["grad_norm"]) > 1.0  # clipping acts in every step
    # AdamW forgives a factor common to all steps, so that clipping acts does not yet mean that it changes anything.
    apart = np.abs(np.array(free["loss"]) - np.array(clipped["loss"]))
    assert apart.max() > 1000 * TOLERANCE
    start = load_file(peer.start / "model.safetensors")
    for norm in peer.runs:
        end = load_file(peer.folder / norm / "model.safetensors")
        # Every tensor has left its start by much more than the tolerance (AdamW moves an entry about lr per step).
        assert all((end[name] - start[name]).abs().max() > LEARNING_RATE for name in start)


@pytest.fixture(scope="module")
def tokenizer_folders(toy, tmp_path_factory) -> list[Path]:
    """The toy's tokenizer, and one that adds BOS when it encodes, as Llama's does."""
    folders = [tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("bos")]
    for folder in folders:
        tokenizer = load_tokenizer(str(toy / "model"))
        if folder == folders[1]:
            bos = tokenizer.bos_token
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.bos_token_id)]
            )
        tokenizer.save_pretrained(folder)
    assert load_tokenizer(str(folders[1]))("a")["input_ids"][0] == load_tokenizer(str(folders[1])).bos_token_id
    return folders


# hh_harmless: strings with an implicit prompt (BOS and EOS are added). alpaca_eval: conversations with an explicit
# prompt (the template alone decides).
REAL_DATA = ("alpaca_eval", "hh_harmless")


@pytest.fixture(scope="module")
def real_rows(tmp_path_factory) -> Path:
    """<folder>/<name>/train.jsonl with 16 rows of each real set that is there."""
    folder = tmp_path_factory.mktemp("real")
    for name in REAL_DATA:
        if (SHARED_DATA / name).is_dir():
            lines = (SHARED_DATA / name / "train.jsonl").read_text(encoding="utf-8").split("\n")[:16]
            (folder / name).mkdir()
            (folder / name / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def peer_ids(toy, real_rows, tokenizer_folders, tmp_path_factory) -> dict[str, dict[str, list]]:
    """By source and tokenizer folder: the token ids (chosen, rejected) that TRL makes; one process for all."""
    sources = [str(path) for path in sorted(real_rows.iterdir())]
    tokenizers = [str(path) for path in tokenizer_folders]
    folder = tmp_path_factory.mktemp("peer_ids")
    return in_a_process(PEER_TOKENIZES, toy / "model", folder, json.dumps(sources), json.dumps(tokenizers))


@pytest.mark.parametrize("name", REAL_DATA)
def test_token_ids_of_real_rows_are_those_of_trl(request, real_rows, tokenizer_folders, tmp_path, name):
    shared_data(name)  # skips, before TRL is started for nothing
    theirs = request.getfixturevalue("peer_ids")[str(real_rows / name)]
    for folder in tokenizer_folders:
        ours = encoded(real_rows / name, "train", load_tokenizer(str(folder)), tmp_path / "cache")
        chosen, rejected = zip(*ours.pairs(range(len(ours))), strict=True)
        assert len(ours) == 16
        assert [[ids.tolist() for ids in side] for side in (chosen, rejected)] == theirs[str(folder)]
