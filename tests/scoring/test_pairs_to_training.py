"""From a reward model's scores to pairs to a second reward model: what is built is read by training, here and in TRL.

The first model, trained here, prefers gloomy answers whatever is asked for, which no other data in the toy says: a second
model can only have it from the pairs.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import in_a_process, read_pairs
from transformers import AutoConfig, AutoModelForSequenceClassification

from open_rm import toy as toys
from open_rm.data.answers import TO_SCORE, read_answers
from open_rm.data.tokenizer import load_tokenizer
from open_rm.flags import Args, OpeningFlags
from open_rm.reward_modeling import main
from open_rm.scoring.agreement import Agreement
from open_rm.scoring.opening import open_scorer
from open_rm.scoring.scorer import Scorer
from open_rm.scoring.selection import Pairs
from open_rm.scoring.streams import ScoredRow
from open_rm.training import plots

ANSWERS = 4  # to a prompt


def ranked_lists(prompts: int, seed: int, *, held_out: bool = False) -> list[dict]:
    """Prompts with answers of both moods, those of neighbouring rows."""
    rows = toys.make_pairs(prompts * ANSWERS // 2, seed, held_out=held_out)
    answers = [row[side][0]["content"] for row in rows for side in ("chosen", "rejected")]
    return [
        {"prompt": row["prompt"], "responses": answers[ANSWERS * i : ANSWERS * (i + 1)], "id": i}
        for i, row in enumerate(rows[:: ANSWERS // 2])
    ]


def scored_by(model: Scorer, rows: list[dict]) -> list[ScoredRow]:
    found = [read_answers(row, TO_SCORE) for row in rows]
    whole = [answers.complete(i) for answers in found for i in range(ANSWERS)]
    rewards = model.rewards(model.encode_conversations(whole)).reshape(-1, ANSWERS).tolist()
    return [
        ScoredRow(f"lists:{i}", row, answers, scores, [False] * ANSWERS)
        for i, (row, answers, scores) in enumerate(zip(rows, found, rewards, strict=True), 1)
    ]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def train(start: Path, data: str, output: Path, pairs: int) -> None:
    main(
        Args(
            model_name_or_path=str(start),
            dataset_mixer_list=[data, "1.0"],
            dataset_local_cache_dir=str(output.parent / "cache"),
            output_dir=str(output),
            total_episodes=pairs,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=1,
            learning_rate=2e-3,
            num_sample_pairs=0,
        )
    )


@dataclasses.dataclass(frozen=True)
class Built:
    """folder: holds models first and second, and pairs.jsonl, trl.jsonl, of which second was trained on the first.
    lists: that the pairs were made of, as the first model scored them."""

    folder: Path
    lists: list[ScoredRow]


@pytest.fixture(scope="module")
def few_curves():
    """Drawing all of them is a second of each run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "PANELS", plots.PANELS[:2])
        yield


@pytest.fixture(scope="module")
def built(toy, tmp_path_factory, few_curves) -> Built:
    folder = tmp_path_factory.mktemp("pairs_to_training")
    is_gloomy = {word: word in toys.ANSWERS["gloomy"] for mood in toys.ANSWERS.values() for word in mood}
    rows = toys.make_pairs(240, seed=11)
    for row in rows:
        words = [word.strip(".") for word in row["chosen"][0]["content"].split()]
        if not any(is_gloomy.get(word) for word in words):
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    train(toy / "model", write(folder / "gloomy.jsonl", rows), folder / "first", 240)
    with open_scorer(OpeningFlags(model=str(folder / "first"))) as first:
        lists = scored_by(first, ranked_lists(200, seed=12))
    for form, name in (("open_rm", "pairs"), ("trl", "trl")):
        pairs = Pairs(TO_SCORE, min_margin=0.5, form=form)
        write(folder / f"{name}.jsonl", [pair for row in lists for pair in pairs.take(row)])
    train(toy / "model", str(folder / "pairs.jsonl"), folder / "second", 400)
    return Built(folder, lists)


def agreement(first: Path, second: Path) -> Agreement:
    """On held-out prompts."""
    rows, sums = ranked_lists(100, seed=13, held_out=True), Agreement()
    with open_scorer(OpeningFlags(model=str(first))) as model, open_scorer(OpeningFlags(model=str(second))) as judge:
        for a, b in zip(scored_by(model, rows), scored_by(judge, rows), strict=True):
            sums.take(a.scores, b.scores)
    return sums


def untrained_model(built: Built, tmp_path: Path) -> Path:
    """The second model as it was made, its weights drawn anew."""
    folder = shutil.copytree(built.folder / "second", tmp_path / "untrained")
    torch.manual_seed(5)
    AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


def test_a_model_trained_on_another_ones_pairs_agrees_with_it_on_held_out_prompts(built, tmp_path):
    sums = agreement(built.folder / "first", built.folder / "second")
    print("\n".join(sums.lines("first", "second")))
    assert sums.strict == sums.pairs == 600
    assert sums.share > 0.8 and sums.tau > 0.6
    untrained = agreement(built.folder / "first", untrained_model(built, tmp_path))
    assert untrained.interval[1] < 0.8, "the bound above tells a model that has learned from one that has not"


def test_training_reads_the_file_pair_for_pair(built, toy, tmp_path):
    rows = [json.loads(line) for line in (built.folder / "pairs.jsonl").read_text().splitlines()]
    tokenizer = load_tokenizer(str(toy / "model"))
    data = read_pairs([built.folder / "pairs.jsonl", "1.0"], tokenizer, dataset_local_cache_dir=str(tmp_path))
    assert len(data) == len(rows) > 400
    assert np.array_equal(data.margins(), np.float32([row["margin"] for row in rows]))
    assert data.margins().min() >= 0.5


PEER_READS = """
import json, sys
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

start, folder, names = *sys.argv[1:3], json.loads(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(f"{folder}/tokenizer")
model = AutoModelForSequenceClassification.from_pretrained(start, num_labels=1, dtype="float32")
config = RewardConfig(
    output_dir=folder, max_length=None, bf16=False, use_cpu=True, report_to="none", max_steps=1, disable_tqdm=True,
    per_device_train_batch_size=2, gradient_checkpointing=False, save_strategy="no",
)
out = {}
for name in names:
    rows = load_dataset("json", data_files=f"{folder}/{name}.jsonl", split="train", cache_dir=f"{folder}/cache")
    trainer = RewardTrainer(model=model, processing_class=tokenizer, train_dataset=rows, args=config)
    prepared = trainer.train_dataset
    out[name] = [prepared["chosen_ids"][:], prepared["rejected_ids"][:]]
    if name == "messages":
        out["batch"] = sorted(next(iter(trainer.get_train_dataloader())))
        trainer.train()
        out["steps"] = trainer.state.global_step
print(json.dumps(out))
"""


def test_trl_reads_its_form_to_the_token_ids_of_training_and_trains_without_a_margin(built, toy, tmp_path):
    calls = {"tools": [{"name": "look", "parameters": {"type": "object"}}], "chat_template_kwargs": {"deep": "deep"}}
    rows = {
        "messages": [row.row for row in built.lists[:4]],
        "text": [{"prompt": prompt, "responses": ["of rain.", "of sun."]} for prompt in ("Sing ", "Tell me ", "")],
        "implied": [{"chosen": "\n\nHuman: Hi\n\nAssistant: Yo.", "rejected": "\n\nHuman: Hi\n\nAssistant: No."}] * 2,
        "template": [built.lists[0].row | calls] * 2,
        "ids": [{"prompt_input_ids": [5, 6], "chosen_input_ids": [5, 6, 7, 1], "rejected_input_ids": [5, 6, 8, 1]}] * 2,
    }
    tokenizer, ours = load_tokenizer(str(toy / "model")), {}
    prints = "{% if tools %}{{ tools | tojson }} {{ deep }}\n{% endif %}"
    tokenizer.chat_template = prints + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for name, given in rows.items():
        answers = [read_answers(row, TO_SCORE) for row in given]
        lists = [
            ScoredRow("", row, found, list(range(len(found.answers))), [])
            for row, found in zip(given, answers, strict=True)
        ]
        for form, suffix in (("trl", ""), ("open_rm", "_ours")):
            pairs = Pairs(TO_SCORE, form=form)
            write(tmp_path / f"{name}{suffix}.jsonl", [pair for row in lists for pair in pairs.take(row)])
        data = read_pairs(
            [tmp_path / f"{name}_ours.jsonl", "1.0"], tokenizer, dataset_local_cache_dir=str(tmp_path / "c")
        )
        ours[name] = [[side.tolist() for side in sides] for sides in zip(*data.pairs(range(len(given))), strict=True)]
    assert ours["template"] != ours["messages"][:2]
    theirs = in_a_process(PEER_READS, toy / "model", tmp_path, json.dumps(list(rows)))
    assert {name: theirs[name] for name in rows} == ours
    assert theirs["steps"] == 1 and "margin" not in theirs["batch"]
