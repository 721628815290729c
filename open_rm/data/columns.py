"""Which columns of a row are read as what: its form, and what is left over.

A plan is made once for rows of the same columns, and kept by the reading. What nobody reads is named; where its name or
content says prompt, system text, label, score, tool or image, the inspection makes a finding of it.
"""

import re
from dataclasses import dataclass

from open_rm.data import labels
from open_rm.data.attributes import Places, places_of
from open_rm.data.forms import (
    DECIDING,
    OPTIONAL,
    OWN_FORMS,
    OWN_NAMES,
    SCORED_FORMS,
    SCORED_SHAPES,
    SHAPES,
    SOFT,
    VOTES,
    Form,
)
from open_rm.data.lookup import Lookup, parse_lookup
from open_rm.data.messages import is_message, parsed_json
from open_rm.data.public_sets import FORMS
from open_rm.data.reading import Reading
from open_rm.errors import UserError, quote

MOST_PLANS = 1000  # of a reading: rows with ever other columns must not fill the memory
# Words of a column's name, and what they say of it. A name with a word of BESIDE tells something about such a value only.
WORDS = {
    "prompt": "prompt prompts question questions query instruction instructions input context history conversation "
    "conversations messages dialog dialogue trajectory turns post posts article document documents passage passages "
    "problem problems task tasks goal inputs contexts",
    "system": "system persona",
    "label": "label labels winner preference preferences preferred choice better best vote votes chosen rejected",
    "score": "score scores rating ratings rank ranks ranking grade grades reward rewards margin strength",
    "tool": "tool tools function functions",
    "image": "image images img picture pictures photo photos audio video videos",
}
SAYS = {word: what for what, words in WORDS.items() for word in words.split()}
BESIDE = set(
    [
        "id",
        "ids",
        "uid",
        "uuid",
        "hash",
        "model",
        "models",
        "source",
        "sources",
        "len",
        "length",
        "lang",
        "language",
        "type",
        "kind",
        "category",
        "url",
        "count",
        "num",
        "number",
        "name",
        "names",
        "time",
        "timestamp",
        "date",
        "index",
        "idx",
        "key",
        "version",
        "split",
        "subset",
        "tokens",
        "token",
        "chars",
        "words",
        "template",
        "status",
    ]
)
ALWAYS = ("margin", "tools", "chat_template_kwargs", *SOFT)  # of forms.OPTIONAL, read in public sets' forms too
# Two columns of scores beside chosen and rejected: whether they agree with it is counted.
TWINS = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_reward", "rejected_reward"),
    ("chosen_avg_rating", "rejected_avg_rating"),
)


@dataclass(frozen=True)
class Plan:
    """How rows of certain columns are read.

    form: of the table.  shape: a name of forms.SHAPES.  values: our column -> where it stands.
    attributes: where those of --attributes stand.
    chat: whether texts become messages.  unread: columns that are not read.
    twins: two unread columns that say how good chosen and rejected are.
    """

    form: Form
    shape: str
    values: dict[str, Lookup]
    attributes: Places
    chat: bool
    labels: dict[str, str]
    lower_is_better: bool
    unread: tuple[str, ...]
    twins: tuple[str, str] | None


def plan_of(row: dict, reading: Reading) -> Plan:
    """How a row is read.

    Raises:
        UserError: it is of no known form, of several, or lacks what the flags name.
    """
    key = (*row, None, *(name for name, value in row.items() if value is None))
    plan = reading.plans.get(key)
    if plan is None:
        plan = _make_plan(row, reading)
        if len(reading.plans) >= MOST_PLANS:
            reading.plans.clear()
        reading.plans[key] = plan
    return plan


def _make_plan(row: dict, reading: Reading) -> Plan:
    present = {name for name in row if name not in reading.ignore}
    filled = {name for name in present if row[name] is not None}
    mapped = {ours: parse_lookup(theirs, present) for ours, theirs in reading.column_map.items()}
    for lookup in mapped.values():
        if not lookup.is_in(present) and (lacking := sorted(set(lookup.columns) - present)):
            raise UserError(f"no column {lacking[0]}, which --column_map names; {columns_of(row)}")
    form = _form_of(row, reading, present, filled)
    reads = {ours: parse_lookup(theirs, present) for ours, theirs in form.reads.items() if ours not in mapped}
    values = {ours: lookup for ours, lookup in reads.items() if lookup.is_in(present)} | mapped
    for ours in OPTIONAL:
        if (
            ours not in values
            and ours in present
            and ours not in form.leaves
            and (form.name in OWN_NAMES or ours in ALWAYS)
        ):
            values[ours] = Lookup(ours, (ours,))
    shapes = SHAPES | SCORED_SHAPES if reading.to_score else SHAPES
    shape = next((shape for shape, needed in shapes.items() if set(needed) <= values.keys()), None)
    if shape is None:
        raise _no_form(row, filled)
    attributes = places_of(reading.attributes, shape, values, present)
    lookups = [*values.values(), *(lookup for _, places in attributes for lookup in places if lookup is not None)]
    used = {name for lookup in lookups for name in lookup.columns} | set(reading.margin_from or ())
    unread = tuple(name for name in row if name in present and name not in used and name not in form.leaves)
    twins = next((pair for pair in TWINS if set(pair) <= filled and shape == "pairs"), None)
    chat = bool(form.chat or {"system", "history"} & values.keys())
    chat = chat if reading.as_messages is None else reading.as_messages
    _check_used(mapped, shape)
    if not reading.to_score:
        _check_meaning(form, reading, shape, values)
        _check_soft(shape, {ours: values[ours] for ours in SOFT if ours in values and _is_filled(values[ours], filled)})
    meant = reading.label_values or form.labels
    lower = form.lower_is_better if reading.lower_is_better is None else reading.lower_is_better
    return Plan(form, shape, values, attributes, chat, meant, lower, unread, twins)


def _check_used(mapped: dict[str, Lookup], shape: str) -> None:
    """What is mapped must have a place in rows of this shape: scores beside chosen and rejected would do nothing."""
    needed = (SHAPES | SCORED_SHAPES)[shape]
    uses = {*needed, *OPTIONAL}
    uses |= {"ranked": {"scores"}, "token ids": {"prompt_input_ids"}}.get(shape, set())
    if idle := [ours for ours in mapped if ours not in uses]:
        raise UserError(
            f"--column_map {idle[0]}={mapped[idle[0]].written}: rows that are read as {' and '.join(needed)} have no use "
            f"for {idle[0]}; remove it, or map what belongs to it as well (docs/data.md)"
        )


def _check_meaning(form: Form, reading: Reading, shape: str, values: dict[str, Lookup]) -> None:
    """A flag for all sources must not turn the labels or scores of a known set round, nor a rank pass as a score."""
    contrary = any(form.labels.get(value, side) != side for value, side in reading.label_values.items())
    if contrary and "label_values" in reading.for_all and shape == "winner" and "winner" not in reading.column_map:
        raise UserError(
            f"--label_values says otherwise than the form {form.name} does, whose values of "
            f"{values['winner'].written} are known; write it for the sources it is meant for: NAME::a=1 NAME::b=0"
        )
    scores = [values[ours] for ours in ("scores", "score_a", "score_b", "score") if ours in values]
    known = (
        form.name not in OWN_NAMES
        and scores
        and not {"scores", "score_a", "score_b", "score"} & set(reading.column_map)
    )
    if known and "lower_is_better" in reading.for_all and reading.lower_is_better != form.lower_is_better:
        raise UserError(
            f"--lower_is_better says otherwise than the form {form.name} does, whose scores ({scores[0].written}) are known; "
            "write it for the sources it is meant for: NAME::True"
        )
    ranks = [lookup.written for lookup in scores if labels.is_called_rank(lookup.text)]
    if (
        ranks
        and reading.lower_is_better is None
        and not form.lower_is_better
        and shape in ("ranked", "two scores", "rows")
    ):
        raise UserError(
            f"{ranks[0]} is read as a score and is called a rank; pass --lower_is_better where 1 is the best, or "
            "--lower_is_better False where more is better"
        )
    numbers = [
        [name.removeprefix(lookup.text[:-1]) for name in lookup.columns]
        for ours, lookup in values.items()
        if ours in ("responses", "scores") and lookup.is_list
    ]
    if len(numbers) == 2 and numbers[0] != numbers[1]:
        raise UserError(
            f"{values['responses'].text} and {values['scores'].text} do not have the same numbers ({', '.join(numbers[0])} and "
            f"{', '.join(numbers[1])}), so it is not known which score is whose; correct the row"
        )


def _check_soft(shape: str, given: dict[str, Lookup]) -> None:
    """A probability or votes are about two sides, and one of both says it. given: those that have a value."""
    if not given:
        return
    ours, where = next((ours, lookup.written) for ours, lookup in given.items())
    leave = f"leave {where} out with --ignore_columns {where}"
    if shape in ("ranked", "rows"):
        what = "a ranked list" if shape == "ranked" else "rows of one answer"
        raise UserError(
            f"{where} is read as {ours}, which says how sure it is that one of two answers is the better one, and {what} may "
            f"give many pairs; write a row for each pair, or {leave}"
        )
    if "label_prob" in given and len(given) > 1:
        votes = next(given[name].written for name in VOTES if name in given)
        raise UserError(
            f"{where} and {votes} both say how sure it is that chosen is the better one; leave one of them out with "
            "--ignore_columns"
        )
    if ours in VOTES and shape in ("winner", "strength", "two scores"):
        raise UserError(
            f"{where} counts votes for chosen or rejected, and rows of response_a and response_b have neither; name the two "
            f"answers chosen and rejected, or {leave}"
        )
    if ours in VOTES and len(given) == 1:
        other = VOTES[ours == VOTES[0]]
        raise UserError(f"{where} says how many chose one side, and there is no value for {other}; add it, or {leave}")


def _is_filled(lookup: Lookup, filled: set[str]) -> bool:
    """Whether a column that is looked into has a value."""
    return bool(set(lookup.columns) & filled)


def _form_of(row: dict, reading: Reading, present: set[str], filled: set[str]) -> Form:
    mapped = reading.column_map.keys()
    if reading.form is not None:
        needs = _needs(reading.form, mapped, DECIDING if reading.to_score else ())
        if lacking := [name for name in needs if name not in filled]:
            raise UserError(
                f"no value for {' and '.join(lacking)}, which --dataset_format {reading.form.name} reads; {columns_of(row)}"
            )
        return reading.form
    fitting = [
        form for form in FORMS.values() if (filled if form.name in OWN_NAMES else present).issuperset(form.needs)
    ]
    if reading.to_score and not fitting:
        fitting = [form for form in SCORED_FORMS if filled.issuperset(form.needs)]
    best = [form for form in fitting if not any(set(form.needs) < set(other.needs) for other in fitting)]
    # A mapping may add to what the columns tell, or say another form.
    adds_to = [form for form in best if form.name not in OWN_NAMES and mapped <= {*form.reads, *OPTIONAL}]
    own = OWN_FORMS + SCORED_FORMS if reading.to_score else OWN_FORMS
    if not adds_to and (meant := _form_that_is_mapped(mapped, filled, own)):
        return meant
    if not best:
        raise _no_form(row, filled)
    if len(best) > 1:
        first, second = (" and ".join(form.needs) for form in best[:2])
        raise UserError(
            f"the row has {first} and also {second}; say which are meant, e.g. --column_map chosen=chosen "
            f"rejected=rejected, or --dataset_format {best[0].name}"
        )
    needs = _needs(best[0], mapped, DECIDING if reading.to_score else ())
    if lacking := [name for name in needs if name not in filled and "none" not in best[0].labels]:
        raise UserError(f"no value for {' and '.join(lacking)}; correct or remove the row")
    return best[0]


def _needs(form: Form, mapped, without=()) -> list[str]:
    """The columns that must have a value, where a mapping reads some of ours from elsewhere.

    without: those of ours that need no value; nor do columns that the form leaves aside, which only tell that it is this form.
    """
    mapped = {*mapped, *without}
    replaced = {name for ours in mapped if ours in form.reads for name in parse_lookup(form.reads[ours]).columns}
    lookups = [parse_lookup(text) for ours, text in form.reads.items() if ours not in mapped]
    kept = {name for lookup in lookups for name in lookup.columns}
    # any of which may be empty
    parts = {name for lookup in lookups if len(lookup.holes) > 1 for name in lookup.columns}
    others = {*parts, *form.leaves}
    return [name for name in form.needs if (name not in replaced or name in kept) and name not in others]


def _form_that_is_mapped(mapped, filled: set[str], own: tuple[Form, ...]) -> Form | None:
    """The form of our own columns that a mapping means; None where it only adds to the form that the columns tell.

    With chosen=better rejected=worse, a row that also has `messages` and `rejected_messages` is read as chosen and rejected.
    """
    have = filled | set(mapped)

    def fits(form: Form) -> tuple:
        return len(set(form.needs) & set(mapped) - set(OPTIONAL)), have.issuperset(form.needs), -len(form.needs)

    best = max(own, key=fits)
    return best if fits(best)[0] else None


def _no_form(row: dict, filled: set[str]) -> UserError:
    """What the row lacks of the form it is nearest to, and what else it may be."""
    shares = {name: len(filled & set(form.needs)) / len(form.needs) for name, form in FORMS.items()}
    nearest = max(FORMS.values(), key=lambda form: (shares[form.name], form.name == "pairs"))
    nearest = nearest if shares[nearest.name] >= 0.6 or nearest.name in OWN_NAMES else FORMS["pairs"]
    missing = [name for name in nearest.needs if name not in filled]
    advice = "name others with --column_map (docs/data.md)"
    labels = [str(name) for name in row if suspicion(name, row[name]) == "label"]
    if labels and not {"chosen", "rejected"} & filled:
        advice = (
            f"{labels[0]} may say which of two answers is better: --column_map response_a=... response_b=... "
            f"winner={labels[0]}, and --label_values for values other than a and b (docs/data.md)"
        )
    return UserError(f"no value for {' and '.join(missing)}; {columns_of(row)}; {advice}")


def columns_of(row: dict) -> str:
    """The columns of a row in half a sentence, shortened."""
    names = ", ".join(sorted(str(name)[:40] if str(name).isprintable() else quote(name, 40) for name in row))
    return f"the row has the columns {names[:200]}" if names else "the row has no columns"


def suspicion(name: str, value: object) -> str | None:
    """What an unread column is by its name or content: a key of WORDS; None where nothing speaks for any."""
    if value is None or value in ("", [], {}):
        return None
    if (isinstance(value, dict) and {"bytes", "path"} & value.keys()) or isinstance(value, bytes):
        return "image"
    words = re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", str(name)).lower())
    says = next((SAYS[word] for word in words if word in SAYS), None)
    if says and not BESIDE & set(words):
        is_text = isinstance(value, str | list | dict)
        return says if is_text or says in ("label", "score") else None
    found = parsed_json(value) if isinstance(value, str) else value
    found = found[0] if isinstance(found, list) and found else found
    return "prompt" if is_message(found) else None
