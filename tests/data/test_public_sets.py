"""Rows in the exact columns of public sets, with their oddities: the pairs, ties, margins and token ids that they must give.

public_rows.jsonl holds them, content invented: set, row, and pairs and ties, or how the sentence that refuses it begins. They were
written from the sets' cards and loading code (public_sets.py names those), apart from the reader.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, read_pairs, toy_flags
from hypothesis import given, settings
from hypothesis import strategies as st

from open_rm.data import guide
from open_rm.data.building import read_both
from open_rm.data.columns import plan_of
from open_rm.data.printed import check_printed
from open_rm.data.public_sets import FORMS, PUBLIC_FORMS
from open_rm.data.reading import Reading, reading_of_source
from open_rm.data.rows import read_row
from open_rm.data.tokenizer import load_tokenizer
from open_rm.errors import UserError
from open_rm.flags import DataFlags

ROWS = [json.loads(line) for line in (Path(__file__).parent / "public_rows.jsonl").open(encoding="utf-8")]
NUMBERED = [pytest.param(case, id=f"{case['set']}-{number}") for number, case in enumerate(ROWS)]


def reading_of(case) -> Reading:
    return Reading(as_messages=case.get("as_messages"))


@pytest.mark.parametrize("case", NUMBERED)
def test_rows_of_public_sets_give_the_pairs_written_by_hand(case):
    before = json.dumps(case["row"])
    if "refused" in case:
        with pytest.raises(UserError) as caught:
            read_row(case["row"], reading_of(case))
        assert str(caught.value).startswith(case["refused"])
        return
    row = read_row(case["row"], reading_of(case))
    found = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected, "margin": p.margin} for p in row.pairs]
    assert (found, row.ties) == (case["pairs"], case["ties"])
    assert json.dumps(case["row"]) == before


def as_chatml(messages: list[dict]) -> str:
    return "\n".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>" for m in messages)


def test_their_token_ids_are_those_of_the_conversations_written_by_hand(toy, write_rows, tmp_path):
    """Rendered here by joining strings; tool calls, which the template does not print, are another test's."""
    tokenizer = load_tokenizer(str(toy / "model"), chat_template_name="chatml")
    cases = [case for case in ROWS if case.get("pairs") and isinstance(case["pairs"][0]["prompt"], list)]
    cases = [
        c
        for c in cases
        if "tool" not in json.dumps(c["pairs"]) and not c["row"].get("tools") and "as_messages" not in c
    ]
    assert len({case["set"] for case in cases}) > 40
    wanted = []
    for case in cases:
        for pair in case["pairs"]:
            sides = [as_chatml(pair["prompt"] + pair[side]) for side in ("chosen", "rejected")]
            wanted.append(tuple(tokenizer(text, add_special_tokens=False)["input_ids"] for text in sides))
    data = read_pairs(
        [write_rows([case["row"] for case in cases]), "1.0"],
        tokenizer,
        max_token_length=4096,
        max_prompt_token_length=4096,
        dataset_local_cache_dir=str(tmp_path / "cache"),
    )
    assert [(a.tolist(), b.tolist()) for a, b in data.pairs(range(len(data)))] == wanted


def test_every_form_of_a_set_has_rows_here_or_is_refused():
    seen = set()
    for case in ROWS:
        try:
            seen.add(plan_of(case["row"], reading_of(case)).form.name)
        except UserError:
            continue
    assert {form.name for form in PUBLIC_FORMS if form.sets} - seen <= {"helpsteer2", "rlaif_v"}


def test_the_page_on_data_is_that_of_the_table():
    page = (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8")
    assert page == guide.guide(), "write it anew; open_rm/data/guide.py says how"


def test_every_command_of_the_page_is_one_that_is_read():
    for form in PUBLIC_FORMS:
        for name, split in form.sets:
            words = guide.flags_of(form, name, split).split()
            flag, splits = words[0].removeprefix("--"), words[4:] or ["test" if form.held_out else "train"]
            flags = DataFlags(**{flag: words[1:3], f"{flag}_splits": splits[-1:]})
            reading_of_source(flags, "eval" if form.held_out else "train", name)
            assert form.source.startswith("http"), form.name


# ---- what was read wrongly, or in silence


def pairs(row, **reading):
    return read_row(row, Reading(**reading)).pairs


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_system_and_question_columns_are_read():
    [pair] = pairs({"system": "You are terse.", "question": "What is 2+2?", "chosen": "4", "rejected": "5"})
    assert pair.prompt == [{"role": "system", "content": "You are terse."}, user("What is 2+2?")]
    assert (pair.chosen, pair.rejected) == ([assistant("4")], [assistant("5")])


def test_a_labelled_row_never_leads_to_chosen_and_rejected():
    row = {"left": "a", "right": "b", "vote": "left"}
    with pytest.raises(UserError, match=r"vote may say which .* response_a=\.\.\. response_b=\.\.\. winner=vote"):
        read_row(row)
    mapped = {"response_a": "left", "response_b": "right", "winner": "vote"}
    with pytest.raises(UserError, match="--label_values"):
        pairs(row, column_map=mapped)
    [pair] = pairs(row, column_map=mapped, label_values={"left": "a", "right": "b"})
    assert (pair.chosen, pair.rejected) == ("a", "b")


def test_the_wrong_guess_at_an_arena_is_refused_and_its_advice_is_right():
    sides = [[user("q"), assistant(text)] for text in ("good", "bad")]
    row = {"conversation_a": sides[1], "conversation_b": sides[0], "winner": "model_b", "judge": "me"}
    with pytest.raises(UserError, match="winner says which answer is better .'model_b'. and is not read") as caught:
        pairs(row, column_map={"chosen": "conversation_a", "rejected": "conversation_b"})
    advice = str(caught.value).partition("--column_map ")[2].partition(",")[0].split()
    [pair] = pairs(row, column_map=dict(entry.split("=") for entry in advice))
    assert (pair.chosen, pair.rejected) == ([assistant("good")], [assistant("bad")])


def test_the_signs_and_values_of_labels():
    sides = {"prompt": "q", "response_a": "x", "response_b": "y"}
    for strength, chosen in ((2, "x"), (-1, "y")):
        [pair] = pairs(sides | {"strength": strength})
        assert (pair.chosen, pair.margin) == (chosen, abs(strength))
    [pair] = pairs(sides | {"pref": -3}, column_map={"strength": "-pref"})
    assert (pair.chosen, pair.margin) == ("x", 3)
    assert read_row(sides | {"strength": 0}).ties == 1
    [pair] = pairs(sides | {"score_a": 1, "score_b": 4}, margin_from=("scores",))
    assert (pair.chosen, pair.margin) == ("y", 3)
    [pair] = pairs(sides | {"score_a": 1, "score_b": 4}, lower_is_better=True)
    assert (pair.chosen, pair.margin) == ("x", None)
    with pytest.raises(UserError, match="winner is 1; it must be"):
        read_row(sides | {"winner": 1})


def test_ranks_negative_margins_and_equal_scores_are_told_or_refused():
    ranked = {"prompt": "q", "responses": ["a", "b", "c"], "scores": [2, 1, 3]}
    assert read_row(ranked).oddities == ("ranks",)
    answers = [{"response": text, "fine-grained_score": score} for text, score in (("a", 2), ("b", 1))]
    rated = {"instruction": "q", "completions": answers}
    assert read_row(rated).oddities == (), "the direction of a public set is known"
    rated["completions"] = [answer | {"place": answer["fine-grained_score"]} for answer in answers]
    mapped = Reading(column_map={"scores": "completions[].place"})
    assert read_row(rated, mapped).oddities == ("ranks",), "but of another column"
    assert [pair.chosen for pair in pairs(ranked, lower_is_better=True)] == ["b", "b", "a"]
    assert read_row(ranked, Reading(lower_is_better=False)).oddities == ()
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 2, "score_rejected": 3}
    assert read_row(row).oddities == ("contrary scores: score_chosen below score_rejected",)
    with pytest.raises(UserError, match="score_chosen - score_rejected is -1, which says that rejected is the better"):
        pairs(row, margin_from=("score_chosen", "score_rejected"))
    row["score_chosen"] = 3
    assert read_row(row).oddities == ("equal scores: score_chosen and score_rejected",)
    assert read_row(row, Reading(margin_from=("score_chosen", "score_rejected"))).ties == 1


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "joined", "oddity"),
    [
        ("Hello", "Hello! How can I help?", "Hello.", "HelloHello! How can I help?", "begins with it"),
        ("Hello", "Helloween", "Hello there", "HelloHelloween", "begins with it"),
        ("Q: why?", "Q: why? a", "Q: why? b", "Q: why? a", "repeated"),
        ("Q: ", "Q: a", "Q: b", "Q: a", "repeated"),
        ("Q: ", "Q: a", "b", "Q: Q: a", "begins with it"),
        ("Q: ", "Q: ", "Q: b", "Q: Q: ", "begins with it"),
    ],
)
def test_a_prompt_is_taken_off_only_where_both_answers_repeat_it(prompt, chosen, rejected, joined, oddity):
    row = read_row({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    assert row.pairs[0].prompt + row.pairs[0].chosen == joined
    assert row.oddities == (oddity,)


CONVERSATION = [user("hi"), assistant("yes")]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]


@pytest.mark.parametrize(
    "written",
    [
        CONVERSATION,
        SHAREGPT,
        json.dumps(CONVERSATION),
        json.dumps(SHAREGPT),
        [
            user([{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]),
            assistant([{"type": "text", "text": "yes"}]),
        ],
        [{"role": "Human", "content": "hi"}, {"role": "model", "content": "yes"}],
    ],
    ids=["plain", "sharegpt", "JSON", "JSON of sharegpt", "parts", "other roles"],
)
def test_messages_of_every_shape_are_the_same_conversation(written):
    [pair] = pairs({"messages": written, "rejected_response": "no"})
    assert (pair.prompt, pair.chosen, pair.rejected) == ([user("hi")], [assistant("yes")], [assistant("no")])


def test_a_single_message_and_a_conversation_that_ends_with_the_user():
    row = {"prompt": user("hi"), "chosen": json.dumps(assistant("yes")), "rejected": assistant("no")}
    ends = {"messages": [user("hi")], "chosen_response": "yes", "rejected_response": "no"}
    assert pairs(row) == pairs(ends)


def test_json_that_is_no_message_is_told():
    row = {"prompt": "q", "chosen": '["yes"]', "rejected": '["no"]'}
    assert read_row(row).oddities == ("JSON",)
    [pair] = pairs(row, column_map={"chosen": "chosen[0]", "rejected": "rejected[0]"})
    assert (pair.chosen, pair.rejected) == ("yes", "no")


def test_several_chosen_and_rejected_make_all_pairs_and_repeats_are_ties():
    row = {"prompt": "q", "chosen": ["a", "b"], "rejected": ["c", "d", "a"]}
    found = read_row(row)
    assert [(pair.chosen, pair.rejected) for pair in found.pairs] == [
        ("a", "c"), ("a", "d"), ("b", "c"), ("b", "d"), ("b", "a")
    ]  # fmt: skip
    assert found.ties == 1
    assert read_row({"prompt": "q", "responses": ["a", "b", "a"]}).ties == 1


def test_no_prompt_beside_a_column_that_looks_like_one_is_refused():
    row = {"chosen": "4", "rejected": "5", "post": "What is 2+2?"}
    with pytest.raises(UserError, match="--column_map prompt=post, or leave it out with --ignore_columns post"):
        read_row(row)
    assert pairs(row, ignore=("post",))[0].prompt == ""
    assert pairs(row, column_map={"prompt": "post"})[0].prompt == "What is 2+2?"


# ---- what a template swallows

TOOLS = [{"type": "function", "function": {"name": "sum", "description": "adds", "parameters": {"type": "object"}}}]


def call(argument):
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": argument}}]}


@pytest.mark.parametrize("name", ["chatml", "llama3", "tulu", "zephyr", "simple_chat"])
def test_what_a_named_template_does_not_print_is_refused_by_name(toy, name):
    tokenizer = load_tokenizer(str(toy / "model"), chat_template_name=name)

    def check(side, **template):
        text = tokenizer.apply_chat_template([user("q"), *side], tokenize=False, **template)
        check_printed(tokenizer, [user("q")], side, text, template)

    check([assistant("a")])
    with pytest.raises(UserError, match=f"the chat template {name} does not print tool calls"):
        check([call("sum")])
    with pytest.raises(UserError, match=f"the chat template {name} does not print tools"):
        check([assistant("a")], tools=TOOLS)
    with pytest.raises(UserError, match="does not print reasoning .*--ignore_columns reasoning_content"):
        check([assistant("a") | {"reasoning_content": "hm"}])


def test_what_a_template_prints_passes_and_a_role_that_it_drops_does_not(toy):
    tokenizer = load_tokenizer(str(toy / "model"))
    tokenizer.chat_template = (
        "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{% for m in messages if m.role != 'system' %}"
        "{{ m.reasoning_content or '' }}{{ m.content | upper }}{{ m.tool_calls or '' }}{% endfor %}"
    )

    def check(messages, **template):
        text = tokenizer.apply_chat_template(messages, tokenize=False, **template)
        check_printed(tokenizer, messages[:-1], messages[-1:], text, template)

    check([user("q"), call("sum") | {"reasoning_content": "hm"}], tools=TOOLS)
    with pytest.raises(UserError, match="does not print the content of a message of role system"):
        check([{"role": "system", "content": "Be kind."}, user("q"), assistant("a")])


# ---- one answer a row, flags for some sources, kinds


def test_answers_of_a_prompt_are_joined_wherever_they_stand(toy, tokenizer, write_rows, tmp_path):
    rows = [
        {"prompt": prompt, "response": f"{prompt} {score}", "score": score}
        for score in (1, 3, 2)
        for prompt in ("one", "two")
    ]
    rows += [{"prompt": "alone", "response": "x", "score": 1}]
    load = lambda given, **flags: read_pairs(  # noqa: E731
        [write_rows(given), "1.0"], tokenizer, dataset_local_cache_dir=str(tmp_path / "cache"), **flags
    )
    data = load(rows)
    [facts] = data.facts
    assert (facts["joined"], facts["rows"], facts["kept"]) == (7, 3, 6)
    assert facts["oddities"]["lonely"]["count"] == 1
    together = load(
        [{"prompt": p, "responses": [f"{p} {s}" for s in (1, 3, 2)], "scores": [1, 3, 2]} for p in ("one", "two")]
    )
    assert [[side.tolist() for side in pair] for pair in data.pairs(range(6))] == [
        [side.tolist() for side in pair] for pair in together.pairs(range(6))
    ]
    assert data.places([0])[0].endswith(":1")
    margins = load(rows, margin_from=["scores"]).margins().tolist()
    assert margins == [1, 2, 1] * 2


def test_helpsteer2_ratings_are_joined_and_their_turns_read(toy, tokenizer, write_rows, tmp_path):
    scores = {"correctness": 1, "coherence": 1, "complexity": 1, "verbosity": 1}
    prompt = "Name a fruit.\n<extra_id_1>Assistant\nApple.\n<extra_id_1>User\nAnother?"
    rows = [{"prompt": prompt, "response": text, "helpfulness": n, **scores} for text, n in (("No.", 0), ("Pear.", 4))]
    data = read_pairs([write_rows(rows), "1.0"], tokenizer, dataset_local_cache_dir=str(tmp_path / "cache"))
    asked = [user("Name a fruit."), assistant("Apple."), user("Another?")]
    wanted = [{"prompt": asked, "chosen": [assistant("Pear.")], "rejected": [assistant("No.")]}]
    same = read_pairs(
        [write_rows(wanted, "b.jsonl"), "1.0"], tokenizer, dataset_local_cache_dir=str(tmp_path / "cache")
    )
    assert [side.tolist() for side in data.pairs([0])[0]] == [side.tolist() for side in same.pairs([0])[0]]


def test_flags_hold_for_all_sources_for_one_or_for_the_held_out_ones():
    flags = DataFlags(
        dataset_mixer_list=["a.jsonl", "1.0", "b.jsonl", "1.0"],
        dataset_mixer_eval_list=["c.jsonl", "1.0"],
        column_map=["chosen=x", "b.jsonl::chosen=y", "eval::chosen=z"],
        as_messages=["b.jsonl::True"],
        dataset_format=["orca", "auto"],
    )
    a, b, c = (
        reading_of_source(flags, *where)
        for where in (("train", "a.jsonl", 0), ("train", "b.jsonl", 1), ("eval", "c.jsonl", 0))
    )
    assert [reading.column_map["chosen"] for reading in (a, b, c)] == ["x", "y", "z"]
    assert [reading.as_messages for reading in (a, b, c)] == [None, True, None]
    assert [reading.form for reading in (a, b, c)] == [FORMS["orca"], None, None]
    for bad in ({"column_map": ["d.jsonl::chosen=y"]}, {"dataset_format": ["orca"] * 3}, {"dataset_format": ["orka"]}):
        with pytest.raises(UserError, match="no source is called d.jsonl|3 values for 2 sources|no form is called so"):
            reading_of_source(DataFlags(**({"dataset_mixer_list": flags.dataset_mixer_list} | bad)))


def test_text_and_messages_on_two_sides_of_a_run_are_refused(tokenizer, write_rows, tmp_path):
    text = write_rows([{"prompt": "q", "chosen": "a", "rejected": "b"}] * 2, "text.jsonl")
    chat = write_rows([{"prompt": [user("q")], "chosen": "a", "rejected": "b"}] * 2, "chat.jsonl")
    flags = {"dataset_local_cache_dir": str(tmp_path / "cache")}
    mixed = DataFlags(dataset_mixer_list=[str(text), "1.0"], dataset_mixer_eval_list=[str(chat), "1.0"], **flags)
    with pytest.raises(UserError, match="pass --as_messages train::True"):
        read_both(mixed, tokenizer, seed=1)
    train, held_out = read_both(
        DataFlags(
            dataset_mixer_list=[str(text), "1.0"],
            dataset_mixer_eval_list=[str(chat), "1.0"],
            as_messages=["train::True"],
            **flags,
        ),
        tokenizer,
        seed=1,
    )
    assert [side.tolist() for side in train.pairs([0])[0]] == [side.tolist() for side in held_out.pairs([0])[0]]


# ---- any row at all


def small_reading(row: dict) -> list[tuple[str, str, str]] | None:
    """An independent reading of rows of text with short names: (prompt, chosen, rejected), or None for another form."""
    text = lambda *names: all(isinstance(row.get(name), str) and row[name].strip() for name in names)  # noqa: E731
    prompt = row.get("prompt") or ""
    if text("chosen", "rejected"):
        return [(prompt, row["chosen"], row["rejected"])] if row["chosen"] != row["rejected"] else []
    if row.get("winner") == "tie":
        return []
    if text("response_a", "response_b", "winner"):
        a, b = row["response_a"], row["response_b"]
        return {"a": [(prompt, a, b)], "b": [(prompt, b, a)], "tie": []}.get(row["winner"].lower()) if a != b else []
    return None


NAMES = [
    "prompt",
    "chosen",
    "rejected",
    "response_a",
    "response_b",
    "winner",
    "question",
    "label",
    "score",
    "id",
    "note",
    "system",
]
TEXTS = st.sampled_from(["", "a", "b", "tie", "Hi", "Hi there", "x y", " ", "0"])


@settings(max_examples=600, deadline=None, derandomize=True)
@given(row=st.dictionaries(st.sampled_from(NAMES), TEXTS | st.none() | st.integers(0, 2), max_size=7))
def test_any_row_gives_the_pairs_of_a_small_reading_or_a_sentence_and_names_what_is_unread(row):
    try:
        found = read_row(row)
    except UserError as error:
        assert str(error) and len(str(error).splitlines()) == 1
        return
    read = {name for lookup in found.plan.values.values() for name in lookup.columns}
    assert read | set(found.plan.unread) | set(found.plan.form.leaves) >= row.keys()
    assert not read & set(found.plan.unread)
    if found.plan.form.name not in ("pairs", "labelled") or "system" in row:
        return
    wanted = small_reading(row)
    whole = [(pair.prompt + pair.chosen, pair.prompt + pair.rejected) for pair in found.pairs]
    if "repeated" not in found.oddities:
        assert whole == [(prompt + chosen, prompt + rejected) for prompt, chosen, rejected in wanted]
    assert len(found.pairs) + found.ties >= 1


# ---- all together


def test_a_run_on_three_forms_with_a_benchmark_held_out(toy, write_rows, tmp_path, run_forked):
    """UltraFeedback, an arena and HelpSteer3 for training, RewardBench held out: each in its own columns, one command."""
    answers = lambda i: (f"{i} is fine and kind", f"{i} is bad")  # noqa: E731
    feedback, arena, helpsteer, bench = [], [], [], []
    for i in range(24):
        good, bad = answers(i)
        asked = f"How is {i}?"
        scored = [{"response": text, "fine-grained_score": s, "model": "m"} for text, s in ((bad, 1.5), (good, 4.0))]
        feedback.append({"source": "s", "instruction": asked, "models": ["m", "m"], "completions": scored})
        sides = [[user(asked), assistant(good)], [user(asked), assistant(bad)]]
        winner = ("model_a", "model_b", "tie (bothbad)")[i % 3]
        a, b = sides if winner == "model_a" else sides[::-1]
        arena.append(
            {
                "question_id": str(i),
                "model_a": "m",
                "model_b": "n",
                "winner": winner,
                "conversation_a": a,
                "conversation_b": b,
                "turn": 1,
            }
        )
        first, second = (good, bad) if i % 2 else (bad, good)
        helpsteer.append(
            {
                "domain": "code",
                "context": [user(asked)],
                "response1": first,
                "response2": second,
                "overall_preference": -2 if i % 2 else 3,
            }
        )
        bench.append(
            {
                "prompt": f"Tell me of {i}",
                "chosen": good,
                "rejected": bad,
                "subset": "chat",
                "id": i,
                "chosen_model": "m",
                "rejected_model": "n",
            }
        )
    sources = [
        write_rows(rows, f"{name}.jsonl") for name, rows in (("f", feedback), ("arena", arena), ("h", helpsteer))
    ]
    held_out = write_rows(bench, "bench.jsonl")
    done = run_forked(
        *toy_flags(
            toy,
            tmp_path / "out",
            dataset_mixer_list=[word for source in sources for word in (source, "1.0")],
            dataset_mixer_eval_list=[held_out, "1.0"],
        )
    )
    assert done.returncode == 0, done.stderr
    log = done.stdout + done.stderr
    for says in (
        "f.jsonl: 24 rows (ultrafeedback), 24 taken, 24 pairs kept",
        "arena.jsonl: 24 rows (arena), 24 taken, 8 ties, 16 pairs kept",
        "h.jsonl: 24 rows (helpsteer3), 24 taken, 24 pairs kept",
        "bench.jsonl: 24 rows (reward_bench), 24 taken, 24 pairs kept",
        "columns read: prompt from instruction, responses from completions[].response, scores from completions[].fine-grained_score",
    ):
        assert says in log, log[-3000:]
    data = read_pairs(
        [word for source in sources for word in (str(source), "1.0")],
        load_tokenizer(str(toy / "model")),
        dataset_local_cache_dir=str(tmp_path / "cache"),
    )
    assert sorted(data.margins()[~np.isnan(data.margins())].tolist()) == [2.0] * 12 + [3.0] * 12
    tokenizer = load_tokenizer(str(toy / "model"))
    assert all(
        "kind" in tokenizer.decode(chosen) and "bad" in tokenizer.decode(rejected)
        for chosen, rejected in data.pairs(range(64))
    )
