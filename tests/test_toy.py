"""The embedded default: nothing to find in it, and what its docstring says is so."""

import dataclasses
import json
import multiprocessing
from itertools import combinations

import pytest

from open_rm.data.tokenizer import load_tokenizer
from open_rm.flags import Args
from open_rm.inspection.__main__ import main as inspect
from open_rm.toy import ANSWERS, ASKS, REQUESTS, TOPICS, ToyArgs, main, make_pairs, put

# Of every prompt its topic, phrasing and mood word.
PARTS = {
    ask.format(mood=word, topic=topic): (topic, ask, word)
    for topic in TOPICS
    for ask in ASKS
    for words in REQUESTS.values()
    for word in words
}


@pytest.fixture(scope="module")
def default_toy(tmp_path_factory):
    """The embedded default in its own size."""
    folder = tmp_path_factory.mktemp("default_toy")
    main(ToyArgs(folder=str(folder)))
    return folder


def prompts(rows):
    return [row["prompt"][0]["content"] for row in rows]


def mood(words_of_moods, text):
    """The only mood of which the text has words."""
    (found,) = (name for name, words in words_of_moods.items() if set(words) & set(text.replace(".", "").split()))
    return found


def test_a_prompt_is_a_topic_a_phrasing_and_a_mood_word():
    assert len(PARTS) == len(TOPICS) * len(ASKS) * 10 == 1800


@pytest.mark.parametrize("seed", [0, 1, 2, 1000])
@pytest.mark.parametrize(("train", "test"), [(6000, 500), (240, 60)])
def test_no_held_out_prompt_occurs_in_training(train, test, seed):
    for other_seed in (seed, seed + 1):
        assert not set(prompts(make_pairs(train, seed))) & set(prompts(make_pairs(test, other_seed, held_out=True)))


def test_held_out_prompts_are_new_combinations_of_what_training_combines():
    train, held_out = (set(prompts(make_pairs(12_000, 1, held_out=held_out))) for held_out in (False, True))
    assert train | held_out <= set(PARTS)
    assert len(held_out) == 360  # all there are; of the 1440 others a few may not have been drawn
    for two in combinations(range(3), 2):
        trained, tested = ({tuple(PARTS[prompt][i] for i in two) for prompt in part} for part in (train, held_out))
        assert tested <= trained


@pytest.mark.parametrize("held_out", [False, True])
def test_length_alone_says_nothing(held_out):
    rows = make_pairs(4000, seed=5, held_out=held_out)
    lengths = [(len(row["chosen"][0]["content"]), len(row["rejected"][0]["content"])) for row in rows]
    longer = sum((chosen > rejected) + (chosen == rejected) / 2 for chosen, rejected in lengths) / len(rows)
    assert abs(longer - 0.5) < 0.01


@pytest.mark.parametrize("held_out", [False, True])
def test_three_prompts_in_four_are_cheerful_and_one_label_in_twenty_is_wrong(held_out):
    rows = make_pairs(6000, seed=7, held_out=held_out)
    asked = [mood(REQUESTS, PARTS[prompt][2]) for prompt in prompts(rows)]
    chosen, rejected = ([mood(ANSWERS, row[side][0]["content"]) for row in rows] for side in ("chosen", "rejected"))
    assert all(one != other for one, other in zip(chosen, rejected, strict=True))
    wrong = [one != other for one, other in zip(asked, chosen, strict=True)]
    assert sum(one == "cheerful" for one in asked) / 6000 == pytest.approx(0.75, abs=0.022)  # four standard errors
    assert sum(wrong) / 6000 == pytest.approx(0.05, abs=0.011)


@pytest.mark.parametrize("size", ["small", "default"])
def test_inspection_finds_nothing(request, tmp_path, size):
    folder = request.getfixturevalue({"small": "toy", "default": "default_toy"}[size])
    report = inspect(
        Args(
            model_name_or_path=str(folder / "model"),
            dataset_mixer_list=[str(folder / "data"), "1.0"],
            dataset_mixer_eval_list=[str(folder / "data"), "1.0"],
            dataset_local_cache_dir=str(tmp_path / "cache"),
            output_dir=str(tmp_path / "out"),
            max_token_length=1024,
            max_prompt_token_length=1024,
        )
    )
    assert report["findings"] == []
    for split in ("train", "eval"):
        found = report["splits"][split]["overall"]
        assert found["pairs"] == found["taken"]  # none is dropped
        assert found["length_baseline"]["accuracy"] < 0.52


def test_held_out_text_needs_no_token_that_training_has_not(toy):
    tokenizer = load_tokenizer(str(toy / "model"))
    ids = {}
    for split in ("train", "test"):
        texts = [
            tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False)
            for row in map(json.loads, (toy / "data" / f"{split}.jsonl").read_text().splitlines())
            for side in ("chosen", "rejected")
        ]
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
        assert tokenizer.batch_decode(encoded) == texts
        ids[split] = {one for text in encoded for one in text}
    assert ids["test"] <= ids["train"]


def test_the_seed_decides_every_row():
    assert make_pairs(20, 4) == make_pairs(20, 4) == make_pairs(30, 4)[:20]
    assert make_pairs(20, 4) != make_pairs(20, 5)


def test_what_is_there_is_kept_unless_the_marker_tells_of_something_else(tmp_path):
    args = ToyArgs(folder=str(tmp_path), train_pairs=20, test_pairs=5, seed=2)
    main(args)
    data, marker = tmp_path / "data" / "test.jsonl", tmp_path / "made.json"
    made = data.read_text()

    data.write_text("kept")
    main(args)
    assert data.read_text() == "kept"

    marker.write_text('{"train": 20, "test": 5, "seed": 2}')  # as written before prompts were held out
    main(args)
    assert data.read_text() == made

    main(dataclasses.replace(args, test_pairs=6))
    assert len(data.read_text().splitlines()) == 6


def make_and_look(folder, seed):
    """In a process of its own; what it sees as soon as it has made it."""
    main(ToyArgs(folder=str(folder), train_pairs=40, test_pairs=5, seed=seed))
    return files_of(folder)


def files_of(folder):
    """All that a run reads."""
    files = [path for part in ("data", "model") for path in (folder / part).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("before", [None, 8])
def test_processes_that_make_it_at_once_each_find_all_of_it_when_they_have_finished(tmp_path, before):
    expected = make_and_look(tmp_path / "alone", seed=7)
    if before is not None:
        make_and_look(tmp_path / "shared", seed=before)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.starmap(make_and_look, [(tmp_path / "shared", 7)] * 4, chunksize=1)
    assert found == [expected] * 4
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == ["data", "made.json", "model"]


def test_a_file_that_is_there_as_it_would_be_made_is_left_alone(tmp_path):
    made, folder = tmp_path / "made", tmp_path / "folder"
    for root, text in ((made, "new"), (folder, "old")):
        (root / "data").mkdir(parents=True)
        (root / "data/same").write_text("same")
        (root / "data/other").write_text(text)
    kept = (folder / "data/same").stat().st_ino
    put(made, folder)
    assert (folder / "data/other").read_text() == "new" and (folder / "data/same").stat().st_ino == kept
