"""Attributes: scores of each answer that are predicted beside the preference (--attributes), read from rows.

An attribute stands in a column of its name, one number for each answer of a row:

    one answer a row, ranked   NAME, of an answer or as a list; or NAME in the objects that hold the responses
    two sides                  SIDE_NAME or NAME_SIDE. SIDE: the answer's column, chosen or rejected, response_a or b, a or b
    NAME=PLACE                 elsewhere, in the language of lookup.py: of an answer, or a list with a number for each
    NAME=PLACE,PLACE           a place for each of two sides

What has no value (null, nothing, N/A) is NaN: nothing is learned from it. An answer is known by its number in its row, chosen
ones before rejected ones, so that its attributes follow it into every pair.
"""

import math
from collections.abc import Sequence

from open_rm.data import labels
from open_rm.data.lookup import EACH, Lookup, parse_lookup
from open_rm.data.messages import parsed_json
from open_rm.errors import UserError

Asked = tuple[tuple[str, tuple[str, ...]], ...]  # (name, places as they were written; none: by its name)
# (name, one place or one for each of two sides, of which one may be None: absent; no place: neither is there)
Places = tuple[tuple[str, tuple[Lookup | None, ...]], ...]
LISTS = ("ranked", "rows")  # shapes whose answers have no sides
LABELLED = ("winner", "strength", "two scores")
MISSING = ("", "n/a", "na", "nan", "none", "null")
UNKNOWN = float("nan")


def parse_attributes(given: Sequence[str]) -> Asked:
    """The values of --attributes.

    Raises:
        UserError: one that cannot be read.
    """
    asked = []
    for text in map(str, given):
        name, equals, where = text.partition("=")
        places = tuple(where.split(",")) if equals else ()
        if not name or not all(places) or len(places) > 2:
            raise UserError(
                f"--attributes {text}: write a name, or NAME=PLACE, or NAME=PLACE,PLACE for two sides (docs/data.md)"
            )
        if not equals and "," in name:
            raise UserError(f"--attributes {text}: separate attributes by spaces ({' '.join(name.split(','))})")
        for place in places:
            try:
                parse_lookup(place)
            except UserError as error:
                raise UserError(f"--attributes {text}: {error}") from None
        asked.append((name, places))
    return tuple(asked)


def places_of(asked: Asked, shape: str, values: dict[str, Lookup], present: set[str]) -> Places:
    """Where the attributes stand in rows of a shape (forms.SHAPES), by the columns that there are and are not ignored.

    values: our column -> where it stands.

    Raises:
        UserError: there are two places for rows whose answers have no sides.
    """
    found = []
    for name, written in asked:
        candidates = [written] if written else _usual(name, shape, values, present)
        lookups = [_present(places, present) for places in candidates]
        there = next(filter(all, lookups), None) or next(filter(any, lookups), ())
        if len(there) > 1 and shape in LISTS:
            raise UserError(
                f"--attributes {name}={','.join(written)}: the row's answers have no two sides, so two places cannot be read; "
                f"name one, {'of the answer' if shape == 'rows' else 'of a list with a number for each response'}"
            )
        found.append((name, there))
    return tuple(found)


def _present(places: tuple[str, ...], present: set[str]) -> tuple[Lookup | None, ...]:
    """The places, None for one that rows of these columns do not have."""
    lookups = [parse_lookup(place, present) for place in places]
    return tuple(lookup if lookup.is_in(present) else None for lookup in lookups)


def _usual(name: str, shape: str, values: dict[str, Lookup], present: set[str]) -> list[tuple[str, ...]]:
    """The places that are looked at for an attribute, the first of which holds that is whole, or else there at all; those of two
    sides are two columns each."""
    if shape in LISTS:
        column, each, _ = values["responses"].text.partition(EACH) if "responses" in values else ("", "", "")
        inside = [(f"{column}{EACH}.{name}",)] if each else []
        return [(name,)] if name in present else inside
    if shape in LABELLED:
        sides = [("response_a", "response_b"), ("a", "b")]
        own = values["response_a"].columns[0], values["response_b"].columns[0]
        sides = [own, *sides] if len({*own}) == 2 else sides
    else:
        sides = [("chosen", "rejected")]
    both = [tuple(f"{side}_{name}" for side in pair) for pair in sides]
    both += [tuple(f"{name}_{side}" for side in pair) for pair in sides]
    return [pair for pair in both if present & {*pair}]


def read_attributes(places: Places, row: dict, counts: Sequence[int]) -> list[tuple[float, ...]]:
    """[answers][K] the attributes of each of a row's answers; none where no attributes are asked.

    counts: how many answers there are: of the list, or of each of two sides.

    Raises:
        UserError: a value that is no number, or not one for each answer.
    """
    columns = [_column(name, lookups, row, counts) for name, lookups in places]
    return list(zip(*columns, strict=True)) if columns else []


def known_of_one_side(places: Places, attributes: list[tuple[float, ...]], counts: Sequence[int]) -> list[str]:
    """Which attributes of a row of two sides are known of answers of one alone: NAME (its places).

    attributes, counts: see `read_attributes`.
    """
    found = []
    for number, (name, lookups) in enumerate(places):
        known = [not math.isnan(answer[number]) for answer in attributes]
        if len(counts) == 2 and any(known[: counts[0]]) != any(known[counts[0] :]):
            found.append(f"{name} ({', '.join(lookup.written for lookup in lookups if lookup is not None)})")
    return found


def _column(name: str, lookups: tuple[Lookup | None, ...], row: dict, counts: Sequence[int]) -> list[float]:
    """[answers] one attribute of all answers."""
    if len(lookups) == len(counts):
        parts = zip(lookups, counts, strict=True)
    else:
        parts = [(lookup, sum(counts)) for lookup in lookups]
    numbers = [number for lookup, count in parts for number in _numbers(name, lookup, row, count)]
    return numbers or [UNKNOWN] * sum(counts)


def _numbers(name: str, lookup: Lookup | None, row: dict, count: int) -> list[float]:
    """[count] of the answers of one place."""
    value = None if lookup is None else lookup.get(row)
    if isinstance(value, str) and value.lstrip().startswith("["):  # a list in a csv file
        found = parsed_json(value)
        value = value if found is None else found
    if _is_missing(value):
        return [UNKNOWN] * count
    inside = f"{lookup.written}[].KEY" if isinstance(value, list) else f"{lookup.written}.KEY"
    if not isinstance(value, list) and count == 1:
        value = [value]
    if not isinstance(value, list) or len(value) != count:
        what = f"a list of {len(value)}" if isinstance(value, list) else "one value"
        raise UserError(
            f"the attribute {name} stands in {lookup.written}, which holds {what}, and {count} answers need a list with a "
            f"number for each; correct the row, or name another place (--attributes {name}=PLACE, or of two sides "
            f"{name}=PLACE,PLACE)"
        )
    where = f"the attribute {name}" + ("" if lookup.written == name else f" in {lookup.written}")
    if keys := next((entry for entry in value if isinstance(entry, dict)), None):
        raise UserError(
            f"{where} is an object with {', '.join(map(str, keys))[:80]}, and has to be a number; name the place of one, {inside} "
            f"(--attributes {name}=PLACE, or of two sides {name}=PLACE,PLACE)"
        )
    return [UNKNOWN if _is_missing(entry) else labels.number(where, _as_truth(entry)) for entry in value]


def _is_missing(value: object) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in MISSING
    return value is None or (isinstance(value, float) and math.isnan(value))


def _as_truth(value: object) -> object:
    """1 and 0 of what is true or false."""
    return labels.TRUTH.get(str(value).strip().lower(), value)
