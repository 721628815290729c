"""How the rows of one source are read: the data flags that decide it, checked, for all sources or for one.

A value of such a flag may be written for some sources alone; the most special one holds:

    --column_map chosen=better rejected=worse              every source
    --column_map eval::chosen=good eval::rejected=bad      the held-out ones (or train::, those of training)
    --column_map my/pairs.jsonl::chosen=good ...           the source of that name
"""

import dataclasses
from dataclasses import dataclass, field

from open_rm.data.attributes import Asked, parse_attributes
from open_rm.data.forms import TARGETS, Form, form_named
from open_rm.data.labels import SIDES
from open_rm.data.lookup import parse_lookup
from open_rm.data.public_sets import FORMS
from open_rm.errors import UserError
from open_rm.flags import DataFlags, ReadingFlags

SCORES = "scores"  # of --margin_from: the difference of the scores that decided who won


@dataclass(frozen=True)
class Reading:
    """How rows are read.

    form: the one that --dataset_format names; None: told by the columns.
    column_map: our column -> where it stands in the row, as it was written.
    label_values: a value of the column winner, as lower-case text -> a, b or tie.
    lower_is_better: the scores are ranks, 1 the best.  None: not said.
    margin_from: margin = first column - second; or ("scores",).
    parse_hh: HH text becomes messages.  as_messages: so does other text.  None: as the form says.
    ignore: columns, and keys of messages, that are taken as absent.
    keep_ties: two answers that are as good are a pair too, with a probability of 0.5.
    attributes: scores of each answer that are read besides, and where they stand (attributes.py).
    to_score: rows are scored and not trained on, so they need not say who won (forms.SCORED_FORMS).
    for_all: those of label_values and lower_is_better that were written for every source, and not for this one or its kind.
    """

    column_map: dict[str, str] = field(default_factory=dict)
    margin_from: tuple[str, ...] | None = None
    parse_hh: bool = False
    form: Form | None = None
    label_values: dict[str, str] = field(default_factory=dict)
    lower_is_better: bool | None = None
    as_messages: bool | None = None
    ignore: tuple[str, ...] = ()
    for_all: tuple[str, ...] = ()
    keep_ties: bool = False
    attributes: Asked = ()
    to_score: bool = False
    plans: dict = field(default_factory=dict, compare=False, repr=False)  # columns.plan_of's memory

    def to_be_scored(self, as_messages: bool | None) -> "Reading":
        """The same for rows that are scored, with texts as messages or not."""
        return dataclasses.replace(self, as_messages=as_messages, to_score=True, plans={})

    def identity(self) -> dict:
        """Everything that decides what a row is read as, as plain values."""
        named = {"form": self.form.name if self.form else None}
        return named | {
            name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("form", "plans", "to_score")
        }


def reading_of_source(flags: DataFlags, split: str = "train", name: str | None = None, position: int = 0) -> Reading:
    """`make_reading` for a source of the mixer lists. Attributes are trained, and held-out data is judged by the reward."""
    named = (flags.dataset_mixer_list[::2], flags.dataset_mixer_eval_list[::2])
    reading = make_reading(flags, split, name, position, named=named)
    attributes = parse_attributes(flags.attributes) if split == "train" else ()
    return dataclasses.replace(reading, keep_ties=flags.keep_ties, attributes=attributes)


def make_reading(
    flags: ReadingFlags,
    split: str = "train",
    name: str | None = None,
    position: int = 0,
    *,
    named: tuple[list[str], list[str]] = ((), ()),
) -> Reading:
    """The reading flags for one source: of `split` (train or eval), called `name`, the `position`-th of its list.

    named: the sources of training and those held out, for which a value may be written alone.

    Raises:
        UserError: a value that cannot be read, or is written for a source that is not named.
    """

    def own(flag: str, given: list[str] | bool, *, all_levels: bool = False) -> list[str]:
        levels = [values for _, values in _levels(named, flag, given, split, name)]
        return [value for values in levels for value in values] if all_levels else (levels or [[]])[0]

    def is_for_all(flag: str, given: list[str] | bool) -> bool:
        return [scope for scope, _ in _levels(named, flag, given, split, name)][:1] == [None]

    reading = Reading(
        column_map=_column_map([values for _, values in _levels(named, "column_map", flags.column_map, split, name)]),
        margin_from=_margin_from(own("margin_from", flags.margin_from)),
        parse_hh=_switch("parse_hh", own("parse_hh", flags.parse_hh)) or False,
        form=_form(flags.dataset_format, named, split, name, position),
        label_values=_label_values(own("label_values", flags.label_values)),
        lower_is_better=_switch("lower_is_better", own("lower_is_better", flags.lower_is_better)),
        as_messages=_switch("as_messages", own("as_messages", flags.as_messages)),
        ignore=tuple(own("ignore_columns", flags.ignore_columns, all_levels=True)),
        for_all=tuple(flag for flag in ("label_values", "lower_is_better") if is_for_all(flag, getattr(flags, flag))),
    )
    if reading.margin_from and "margin" in reading.column_map:
        raise UserError("--margin_from and margin in --column_map both say where margins are; pass one")
    if reading.parse_hh and reading.as_messages is False:
        raise UserError("--parse_hh makes messages of HH text and --as_messages False keeps text; pass one")
    return reading


def _levels(
    named: tuple[list[str], list[str]], flag: str, given: list[str] | bool, split: str, name: str | None
) -> list[tuple[str | None, list[str]]]:
    """(scope, values) of a flag that are about a source: its own, its split's, those for all; only those that were written."""
    values = [str(given)] if isinstance(given, bool) else list(given)
    names = {*named[0], *named[1]}
    found: dict[str | None, list[str]] = {}
    for value in map(str, values):
        scope = next((scope for scope in (*names, "train", "eval") if value.startswith(f"{scope}::")), None)
        if scope is None and "::" in value:
            raise UserError(
                f"--{flag} {value}: no source is called {value.partition('::')[0]}; the sources are "
                f"{', '.join(sorted(names))}, or write train:: or eval:: for all of a kind"
            )
        found.setdefault(scope, []).append(value if scope is None else value.removeprefix(f"{scope}::"))
    scopes = dict.fromkeys((name, split, None))
    return [(scope, found[scope]) for scope in scopes if scope in found]


def _form(
    given: list[str], named: tuple[list[str], list[str]], split: str, name: str | None, position: int
) -> Form | None:
    """The form of a source: one for all, or one each in the order of the training sources (of the eval ones after eval::)."""
    scope, values = (_levels(named, "dataset_format", given, split, name) or [(None, [])])[0]
    count = len(named[scope == "eval"]) if scope in (None, "train", "eval") else 1
    if len(values) > 1 and len(values) != count:
        where = "" if scope is None else f" of {scope}"
        raise UserError(
            f"--dataset_format has {len(values)} values for {count} sources{where}; give one, one per training source, or "
            "write NAME::form for one source"
        )
    if len(values) > 1 and split == "eval" and scope is None:
        return None
    named = values[min(position, len(values) - 1)] if values else "auto"
    return None if named == "auto" else form_named(named, FORMS)


def _column_map(levels: list[list[str]]) -> dict[str, str]:
    """The map of all levels together, the most special first: what is written for one source adds to what is for all."""
    maps = [_one_map(entries) for entries in levels]
    return {ours: theirs for mapped in reversed(maps) for ours, theirs in mapped.items()}


def _one_map(entries: list[str]) -> dict[str, str]:
    mapped: dict[str, str] = {}
    for entry in entries:
        ours, equals, theirs = entry.partition("=")
        if not equals or not theirs or ours not in TARGETS or ours in mapped:
            raise UserError(
                f"--column_map {entry}: write our column, an equals sign and the file's column, each of ours once, e.g. "
                f"chosen=better rejected=worse; ours are {', '.join(TARGETS)}"
            )
        parse_lookup(theirs)
        mapped[ours] = theirs
    return mapped


def _margin_from(values: list[str]) -> tuple[str, ...] | None:
    if values and values != [SCORES] and len(values) != 2:
        raise UserError(
            f"--margin_from takes two columns, of chosen and of rejected, or the word {SCORES}; got {len(values)}"
        )
    return tuple(values) or None


def _label_values(entries: list[str]) -> dict[str, str]:
    meant: dict[str, str] = {}
    for entry in entries:
        side, equals, value = entry.partition("=")
        if not equals or side not in SIDES or value.strip().lower() in meant:
            raise UserError(
                f"--label_values {entry}: write a, b or tie, an equals sign and the value of the label that means it, "
                "each value once, e.g. a=1 b=0 tie=2"
            )
        meant[value.strip().lower()] = side
    return meant


def _switch(flag: str, values: list[str]) -> bool | None:
    if not values:
        return None
    if len(values) > 1 or values[0].lower() not in ("true", "false"):
        raise UserError(f"--{flag} {' '.join(values)}: write --{flag}, --{flag} False, or NAME::True for one source")
    return values[0].lower() == "true"
