"""What happened to the rows of a block, or of a source: counted, with the first place of each kind.

One object for both: a block's counts are added to its source's. They are kept beside the cache, printed as the log's lines,
and judged by the inspection.
"""

import math
from dataclasses import dataclass, field

from open_rm.data.columns import Plan, suspicion
from open_rm.data.forms import SOFT, TARGETS
from open_rm.data.grouping import Joined
from open_rm.data.rows import ODDITIES, Row

NOTHING_KNOWN = {"places": (), "columns": (), "answers": 0, "known": 0, "least": None, "most": None}  # of an attribute
LOOKED_AT = 20  # values of an unread column, in each block, that are looked at for what they hold


@dataclass
class Counts:
    """dropped, oddities: what -> {count, first place}, of pairs and of rows.  forms: form -> rows.

    ties: pairs that prefer neither side and are left out.  ties_trained: those that are kept, with a label_prob of 0.5.
    soft_labels: pairs that are kept with one between 0.5 and 1.
    truncated: pairs that were cut; promptless: those that lost their whole prompt.
    read: our column -> where it stood.  unread: column -> {says: what its name or content says it is, or None; first}.
    held_out_form: rows of a form that is a benchmark's.
    read_rows: rows that were read, those of ties alone too.
    attributes: name -> {places; columns, those that the places are in; of how many answers of the kept pairs it is known, and of how many there are; least, most}.
    """

    forms: dict[str, int] = field(default_factory=dict)
    ties: int = 0
    ties_trained: int = 0
    soft_labels: int = 0
    truncated: int = 0
    promptless: int = 0
    dropped: dict[str, dict] = field(default_factory=dict)
    oddities: dict[str, dict] = field(default_factory=dict)
    read: dict[str, str] = field(default_factory=dict)
    unread: dict[str, dict] = field(default_factory=dict)
    held_out_form: int = 0
    read_rows: int = 0
    attributes: dict[str, dict] = field(default_factory=dict)

    def drop(self, reason: str, pairs: int, place: str) -> None:
        """Count dropped pairs."""
        _count(self.dropped, reason, pairs, place)

    def add_label(self, label_prob: float, pairs: int) -> None:
        """Count kept pairs by how sure it is that chosen is the better one."""
        if label_prob == 0.5:
            self.ties_trained += pairs
        elif label_prob < 1:
            self.soft_labels += pairs

    def add_attributes(self, names: list[str], sides: tuple[tuple[float, ...], ...], pairs: int) -> None:
        """Count kept pairs by which attributes are known of their two sides."""
        for name, *numbers in zip(names, *sides, strict=True):
            known = [number for number in numbers if not math.isnan(number)]
            entry = NOTHING_KNOWN | {"answers": pairs * len(numbers), "known": pairs * len(known)}
            entry |= {"least": min(known, default=None), "most": max(known, default=None)}
            self._add_attribute(name, entry)

    def _add_attribute(self, name: str, entry: dict) -> None:
        mine = self.attributes.setdefault(name, dict(NOTHING_KNOWN))
        for what in ("places", "columns"):
            mine[what] = list(dict.fromkeys([*mine[what], *entry[what]]))
        for what in ("answers", "known"):
            mine[what] += entry[what]
        for what, best in (("least", min), ("most", max)):
            mine[what] = best((one[what] for one in (mine, entry) if one[what] is not None), default=None)

    def add_rows(self, rows: list[tuple[str, dict, Row, int]]) -> None:
        """Count rows that were read: (place, as it stands in the file, as it was read, times it is taken)."""
        plans: dict[int, Plan] = {}
        looked: dict[str, int] = {}
        for place, raw, row, times in rows:
            self.read_rows += 1
            if row.form:
                self.forms[row.form] = self.forms.get(row.form, 0) + 1
            self.ties += row.ties * times
            self.held_out_form += row.plan.form.held_out
            for what in row.oddities:
                _count(self.oddities, what, 1, place)
            plans[id(row.plan)] = row.plan
            self._look_at_unread(place, raw, row.plan, looked)
        for plan in plans.values():
            self.read |= {ours: lookup.written for ours, lookup in plan.values.items() if ours not in self.read}
            for name, places in plan.attributes:
                there = [lookup for lookup in places if lookup is not None]
                columns = [shown(column) for lookup in there for column in lookup.columns]
                entry = {"places": [lookup.written for lookup in there], "columns": columns}
                self._add_attribute(name, NOTHING_KNOWN | entry)
            for name in plan.unread:
                self.unread.setdefault(shown(name), {"says": None, "first": None})

    def _look_at_unread(self, place: str, raw: dict, plan: Plan, looked: dict[str, int]) -> None:
        """looked: how many values of a column were looked at. Empty ones say nothing and may stand in front of others."""
        raw = raw.first if isinstance(raw, Joined) else raw
        for name in plan.unread:
            if looked.get(name, 0) >= LOOKED_AT or raw[name] in (None, "", [], {}):
                continue
            looked[name] = looked.get(name, 0) + 1
            found = self.unread.setdefault(shown(name), {"says": None, "first": None})
            if says := suspicion(name, raw[name]):
                found |= {"says": says, "first": place}
                looked[name] = LOOKED_AT

    def add(self, other: "Counts") -> None:
        """Add a later block's."""
        for form, count in other.forms.items():
            self.forms[form] = self.forms.get(form, 0) + count
        for mine, theirs in ((self.dropped, other.dropped), (self.oddities, other.oddities)):
            for what, entry in theirs.items():
                _count(mine, what, entry["count"], entry["first"])
        for name in ("ties", "ties_trained", "soft_labels", "truncated", "promptless", "held_out_form", "read_rows"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name, entry in other.attributes.items():
            self._add_attribute(name, entry)
        self.read = other.read | self.read
        for name, entry in other.unread.items():
            mine = self.unread.setdefault(name, entry)
            if mine["says"] is None:
                self.unread[name] = entry


def _count(entries: dict[str, dict], what: str, count: int, place: str) -> None:
    entry = entries.setdefault(what, {"count": 0, "first": place})
    entry["count"] += count


def source_line(fact: dict) -> str:
    """What became of a source's rows."""
    forms = "; ".join(form if len(fact["forms"]) == 1 else f"{n} {form}" for form, n in fact["forms"].items())
    joined = f"{fact['joined']} rows joined to " if fact["joined"] else ""
    what = "prompts" if joined else "rows"
    parts = [
        f"{fact['name']}: {joined}{fact['rows']} {what}" + (f" ({forms})" if forms else ""),
        f"{fact['taken']} taken",
    ]
    parts += [f"{fact['ties']} ties"] if fact["ties"] else []
    if fact["ties_trained"]:
        flag = "" if set(SOFT) & fact["read"].keys() else " (--keep_ties)"  # else some may be by their label_prob
        parts.append(f"{fact['ties_trained']} ties trained{flag}")
    parts += [f"{fact['soft_labels']} pairs with a soft label"] if fact["soft_labels"] else []
    for key, entry in fact["oddities"].items():
        parts.append(f"{entry['count']} rows {oddity_sentence(key)} (first {entry['first']})")
    for reason, drop in fact["dropped"].items():
        parts.append(f"{drop['count']} filtered ({reason}; first {drop['first']})")
    if fact["skipped"]:
        first = fact["skipped"][0]
        parts.append(f"{len(fact['skipped'])} bad rows skipped (first {first['place']}: {first['what']})")
    promptless = f" ({fact['promptless']} lost their whole prompt)" if fact["promptless"] else ""
    parts += [f"{fact['truncated']} truncated{promptless}"] if fact["truncated"] else []
    return ", ".join([*parts, f"{fact['kept']} pairs kept"])


def oddity_sentence(key: str) -> str:
    """An oddity of rows in words; a key may name the columns it is about."""
    what, _, about = key.partition(": ")
    return ODDITIES[what].format(about)


def columns_line(fact: dict) -> str | None:
    """Which columns were read as what, and which were not read."""
    if not fact["read"]:
        return None
    places = sorted(fact["read"].items(), key=lambda item: TARGETS.index(item[0]))
    read = [ours if ours == theirs else f"{ours} from {shown(theirs)}" for ours, theirs in places]
    unread = ", ".join(fact["unread"]) or "none"
    return f"  columns read: {', '.join(read)}; not read: {unread}"


def attribute_lines(fact: dict) -> list[str]:
    """Of how many answers each attribute is known, and the range of its values, which may differ between sources."""
    return [f"  attribute {line}" for line in _attributes(fact)]


def attribute_cells(fact: dict) -> dict[str, str]:
    """The same as a row of a table; nothing where none are asked."""
    return {"attributes": "\n".join(lines)} if (lines := _attributes(fact)) else {}


def _attributes(fact: dict) -> list[str]:
    lines = []
    for name, entry in fact.get("attributes", {}).items():
        places = ", ".join(map(shown, entry["places"]))
        place = f" (from {places})" if places not in ("", name) else ""
        known, answers = entry["known"], entry["answers"]
        share = f" ({known / answers:.0%}), {entry['least']:g} to {entry['most']:g}" if known else ""
        lines.append(f"{shown(name)}{place}: known of {known} of {answers} sides of pairs{share}")
    return lines


def shown(name: object) -> str:
    """A column's name on one line, in letters that every file and console takes."""
    name = str(name).replace("\n", "\\n")
    return name[:60] if name.isprintable() else ascii(name)[:60]
