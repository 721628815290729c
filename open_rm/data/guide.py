"""docs/data.md, made from the table of forms: which public sets are read, by which flags, and as what.

python -c "from open_rm.data.guide import guide; print(guide(), end='')" > docs/data.md
"""

from open_rm.data.forms import OPTIONAL, OWN_FORMS, Form
from open_rm.data.public_sets import PUBLIC_FORMS

HEAD = r"""<!-- Made from the table of forms in open_rm/data/public_sets.py (see open_rm/data/guide.py); change it there. -->
# Preference data

What a source's rows look like is found out from their columns, and said in the log: the form, which column was read as what,
and which columns were not read. A column that is not read and looks as if it should be (prompt, system text, label, score,
tools, image) is a finding of the look at the data, which opens every training and with `--strict` stops it. Look first:

```bash
python -m open_rm.inspection --model_name_or_path Qwen/Qwen3-0.6B --dataset_mixer_list openbmb/UltraFeedback 1.0
```

## Public sets

The flags are all that is needed besides the model; a file in the same columns takes the same flags with its own name. Several
sources in one list are read each in its own form; rows of text and of messages do not mix.
"""

LANGUAGE = r"""
## Rows in our own columns

| `--dataset_format` | columns | the log calls it |
| --- | --- | --- |
{own}

Beside them may stand {optional}. `chosen`, `rejected` and answers are text, messages, or (chosen and rejected) lists of
several answers, of which every chosen one is over every rejected one. `winner` is a, b, response_a, model_a, ..., or tie;
`strength` is above 0 where `response_a` is better, below 0 where `response_b` is; `responses` without `scores` are in order,
the best first. Ties, answers that are alike and equal scores give no pair and are counted.

How sure it is that `chosen` is the better one may stand beside two sides, in any set:

| columns | say |
| --- | --- |
| `label_prob` | the probability that `chosen` (of labelled rows: the winner) is the better one, 0 to 1; 1 where it is empty |
| `n_chosen`, `n_rejected` | how many voted for each; the probability is their share. Not beside `response_a` and `response_b` |

Below 0.5 the sides change places, and the probability and margin become those of the new order; that is counted. A margin that
says otherwise is refused, since it would be no margin of the new order. At 0.5 the row is a tie, which is trained towards equal
rewards. Ranked lists, rows of one answer, and rows that give several pairs can have neither of them.

`--keep_ties` makes pairs with a probability of 0.5, and a margin of 0, of labelled ties, a `strength` of 0, equal scores and tied
answers of a list; `chosen` is the one that stands first. Answers that are alike still give no pair, nor does a labelled
row that nobody voted on (a `winner` that is none, in sets that have it); `n_chosen` and `n_rejected` that are both 0 are refused.

All pairs of one row are one list (`--list_loss`): of ranked responses, of answers joined by their prompt, of several chosen
and rejected answers. Answers with equal scores have the same place in it. A row that is taken twice is two lists, and a pair that
is filtered by its length is missing from its list.

## Attributes of answers

`--attributes` reads scores of each answer that are predicted beside the preference, and `--attribute_weights` says how much each
prediction adds to the reward (0: nothing). Decoders alone can have them. HelpSteer2's five, with weights of its authors
(https://arxiv.org/abs/2406.08673):

```bash
python -m open_rm.reward_modeling --dataset_mixer_list nvidia/HelpSteer2 1.0 \
    --attributes helpfulness correctness coherence complexity verbosity --attribute_weights 0.3 0.74 0.46 0.47 -0.33
```

| rows | an attribute NAME stands in |
| --- | --- |
| of one answer | `NAME` |
| of a ranked list | `NAME`, a list with a number for each response; or, for responses in `completions[].response`, `completions[].NAME` |
| of two sides | `chosen_NAME` and `rejected_NAME`, or `NAME_chosen` and `NAME_rejected` |
| of `response_a` and `response_b` | the same with `response_a` and `response_b`, `a` and `b`, or the columns that they are read from (`response_0_NAME`) |

Elsewhere: `NAME=PLACE`, an expression of the next section that gives the number of an answer, or a list with a number for each;
`NAME=PLACE,PLACE` gives one for each of two sides. A side of several answers has a list. True is 1 and false is 0.

| set | `--attributes` |
| --- | --- |
| openbmb/UltraFeedback | `'helpfulness=completions[].annotations.helpfulness.Rating'`, `'honesty=completions[].annotations.honesty.Rating'` |
| PKU-Alignment/PKU-SafeRLHF | `severity_level`, `safe=is_response_0_safe,is_response_1_safe` |
| HuggingFaceH4/ultrafeedback_binarized | `score` |
| llm-blender/Unified-Feedback:all | `rating` |

What is empty or N/A is not known, and nothing is learned from it; nor is an attribute that a source does not have. The log
says how many are known and in which range: sources of different scales are better not mixed. A PLACE whose
column is in no row is refused. An attribute that is the same of all answers, or in most rows is known of one of two sides alone,
is a finding. They are read from training data alone; the same columns of held-out data are left unread, without a finding.

Each attribute is predicted less its mean over the training data. The mean squared error of a pair's known values is added to its
loss, `--attribute_coefficient` times (1), and logged as `train/rm/loss_attributes`. An answer counts once for each pair that it is
in, in the mean as in the error, so those of a list several times. No held-out number says how well an attribute is predicted:
evaluations judge the reward.

## Rows in other columns

`--column_map ours=theirs` says where our columns stand:

| expression | is |
| --- | --- |
| `prompt=question` | a column |
| `prompt=question.full_text` | a key of an object |
| `responses=completions[].response` | that of every element of a list |
| `prompt=turns[0]`, `turns[-1]`, `turns[:-1]` | one element, or a part |
| `responses=answer_*` | columns that differ by a number, as a list |
| `strength=-preference` | the negative: of a strength that is above 0 where the second is better |
| `'prompt={instruction}\n{input}'` | several joined; a line whose values are all empty is left out |

Lists and objects may stand as JSON text, as csv files hold them. Mapping one of our columns adds to the form that the
columns tell (`--column_map winner=safer_response_id`); mapping those that make a comparison says another form.

| flag | is for |
| --- | --- |
| `--label_values a=1 b=0 tie=2` | what the values of `winner` mean |
| `--lower_is_better` | scores that are ranks |
| `--margin_from score_chosen score_rejected` | margins; a negative one is refused, an equal pair is a tie |
| `--margin_from scores` | margins from the scores that decided |
| `--as_messages` | a prompt and answers of text as turns of user and assistant |
| `--parse_hh` | "Human: ... Assistant: ..." text as messages |
| `--ignore_columns reasoning_content` | columns, and keys of messages, to take as absent |
| `--dataset_format NAME` | the form, where columns alone would say another |

Each of these holds for all sources, or for some: `--as_messages train::True`, `--column_map eval::chosen=good
eval::rejected=bad`, `--dataset_format my/pairs.jsonl::orca`. The most special one holds; entries of `--column_map` and `--ignore_columns` add to
those for all. What a known set's labels and scores mean is turned round only by a flag that is written for that source.

Messages are lists of role and content, with content as text or as text parts; from/value with human and gpt; one message
alone; roles of other projects for tool calls and results. What the chat template does not print (tool calls, tools,
reasoning, a role's text) is refused by naming the template.
"""


def guide() -> str:
    """The page."""
    rows = ["| set | flags | form | read as |", "| --- | --- | --- | --- |"]
    rows += [_set_row(form, name, split) for form in PUBLIC_FORMS for name, split in form.sets]
    loose = ["| form | columns | read as |", "| --- | --- | --- |"]
    loose += [f"| {form.name} | {_code(form.needs)} | {_read_as(form)} |" for form in PUBLIC_FORMS if not form.sets]
    own = [
        f"| {form.name} | {_code(form.needs)} | {form.says or 'text or messages, prompt given or implied'} |"
        for form in OWN_FORMS
    ]
    sources = [f"- {form.name}: {form.source}" for form in PUBLIC_FORMS if form.source]
    language = LANGUAGE.replace("{own}", "\n".join(own)).replace("{optional}", _code(OPTIONAL))
    return "\n".join(
        [HEAD, *rows, "", "Forms of files that have no one place on the Hub:", "", *loose, language]
        + ["## Where the columns were looked up", "", *sources, ""]
    )


def flags_of(form: Form, name: str, split: str) -> str:
    """The flags that read a set."""
    flag, usual = ("dataset_mixer_eval_list", "test") if form.held_out else ("dataset_mixer_list", "train")
    return f"--{flag} {name} 1.0" + (f" --{flag}_splits {split}" if split != usual else "")


def _set_row(form: Form, name: str, split: str) -> str:
    link = name.partition(":")[0]
    link = "/".join(link.split("/")[:2])
    return f"| [{name}](https://huggingface.co/datasets/{link}) | `{flags_of(form, name, split)}` | {form.name} | {_read_as(form)} |"


def _read_as(form: Form) -> str:
    if form.refuses:
        return f"refused: {form.refuses}"
    places = [ours if ours == theirs else f"{ours}={theirs}" for ours, theirs in form.reads.items()]
    return _code(places) + (f"; {form.note}" if form.note else "")


def _code(words) -> str:
    return ", ".join(f"`{word}`".replace("|", "\\|").replace("\n", "\\n") for word in words)
