"""A token of its own to score: where it stands, that it is saved, that clients read the same reward, what is refused."""

import json

import pytest
import torch
from conftest import toy_flags
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from word_level import BOS, EOS, HI, NO, TEMPLATE, YES, YOU, ids, make
from word_level import load as load_made

from open_rm.data.tokenizer import load_tokenizer, reward_token_of
from open_rm.errors import UserError

REWARD = 9  # the first id after the nine words
TOKEN = "<|reward|>"


@pytest.mark.parametrize("adds_eos", [False, True])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_plain_text_ends_with_eos_and_the_reward_token(tmp_path, adds_bos, adds_eos):
    tokenizer = load_made(tmp_path, make(adds_bos, adds_eos), reward_token=TOKEN)
    bos = [BOS] if adds_bos else []
    assert ids(tokenizer, "hi ", "you yes ", "no ")[:2] == (
        [*bos, HI, YOU, YES, EOS, REWARD],
        [*bos, HI, NO, EOS, REWARD],
    )


def test_the_template_writes_the_reward_token_after_the_response_and_not_after_the_prompt(tmp_path):
    tokenizer = load_made(tmp_path, make(False, chat_template=TEMPLATE), reward_token=TOKEN)
    prompt, answers = (
        [{"role": "user", "content": "hi"}],
        [[{"role": "assistant", "content": c}] for c in ("yes", "no")],
    )
    chosen, rejected, length = ids(tokenizer, prompt, *answers)
    assert (chosen[-3:], rejected[-3:], length) == ([YES, EOS, REWARD], [NO, EOS, REWARD], 3)


def test_a_token_that_the_vocabulary_has_is_taken_as_it_is(tmp_path):
    tokenizer = load_made(tmp_path, make(False), reward_token="bot:")
    assert ids(tokenizer, "hi ", "you ", "no ")[0] == [HI, YOU, EOS, 8]
    assert len(tokenizer) == 9 + 1  # the pad token alone is new


def test_it_is_saved_with_the_tokenizer_and_appended_once(tmp_path):
    load_made(tmp_path, make(False, chat_template=TEMPLATE), reward_token=TOKEN).save_pretrained(tmp_path / "a")
    for options in ({}, {"reward_token": TOKEN}, {"chat_template_name": "simple_chat"}):
        again = load_tokenizer(str(tmp_path / "a"), **options)
        assert reward_token_of(again) == TOKEN
        conversation = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
        assert again.apply_chat_template(conversation, tokenize=False).count(TOKEN) == 1
    with pytest.raises(UserError, match="was saved with the reward token"):
        load_tokenizer(str(tmp_path / "a"), reward_token="bot:")


@pytest.mark.parametrize("token", ["</s>", "<s>", "<unk>", "<|pad|>"])
def test_a_token_with_another_purpose_is_refused(tmp_path, token):
    with pytest.raises(UserError, match="--reward_token .*: is the tokenizer's"):
        load_made(tmp_path, make(False), reward_token=token)


def test_a_token_that_occurs_in_the_data_is_refused_with_its_row(toy, load, write_rows):
    tokenizer = load_tokenizer(str(toy / "model"), reward_token=TOKEN)
    rows = [{"chosen": "a b", "rejected": "c"}, {"chosen": f"a {TOKEN} b", "rejected": "c"}]
    with pytest.raises(UserError, match=r"rows.jsonl:2: the text contains the reward token '<\|reward\|>' itself"):
        load([write_rows(rows), "1.0"], tokenizer=tokenizer)


@pytest.mark.parametrize("num_proc", [1, 2])
def test_rows_of_token_ids_end_with_it_too(toy, load, write_rows, num_proc):
    tokenizer = load_tokenizer(str(toy / "model"), reward_token=TOKEN)
    reward = tokenizer.reward_token_id
    rows = [{"chosen_input_ids": [5, 6, 7], "rejected_input_ids": [5, 8, reward]}]
    data = load([write_rows(rows), "1.0"], tokenizer=tokenizer, num_proc=num_proc)
    [(chosen, rejected)] = data.pairs([0])
    assert (chosen.tolist(), rejected.tolist()) == ([5, 6, 7, reward], [5, 8, reward])


@pytest.mark.parametrize("layout", ["padded", "shared_prefix"])
def test_clients_of_the_saved_folder_read_the_reward_there(toy, tmp_path, layout, run_forked):
    done = run_forked(
        *toy_flags(toy, tmp_path / "out", reward_token=TOKEN, total_episodes=16, batching=layout, score_init="zeros")
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "reload check" in done.stdout and "score head initialised with zeros" in done.stdout
    assert f"scored token '{TOKEN}'" in done.stdout
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    row = json.loads((toy / "data" / "test.jsonl").read_text().splitlines()[0])
    prompt = row["prompt"] if isinstance(row.get("prompt"), list) else []
    text = tokenizer.apply_chat_template(prompt + row["chosen"], tokenize=False)
    assert text.endswith(TOKEN)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        expected = plain(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits.item()
    scored = pipeline("text-classification", model=str(tmp_path / "out"))(text)[0]["score"]
    assert scored == pytest.approx(expected, abs=1e-5)
    assert abs(expected) > 0  # a head of zeros has learnt something
