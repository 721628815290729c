"""Two scored answers as a row of preference data: our columns, or TRL's.

Both are prompt, chosen and rejected, text or messages as the row was. TRL's differs where TRL reads otherwise:

    token ids           chosen_ids, rejected_ids (ours: chosen_input_ids, rejected_input_ids, and prompt_input_ids)
    text                its prompt is a column even where it is empty, because the first row decides for all
    tools               JSON text, which a table keeps as it is
    margin              score_chosen and score_rejected instead: TRL trains with a margin (Llama 2's loss) as soon as there is
                        such a column, and open_rm where --margin_loss asks for it
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from open_rm.data.columns import plan_of
from open_rm.data.forms import OWN_NAMES, TARGETS
from open_rm.data.public_sets import FORMS
from open_rm.data.reading import Reading
from open_rm.errors import UserError
from open_rm.scoring.streams import ScoredRow

SPECIAL = frozenset(name for form in FORMS.values() for name in form.needs)
MOST_KINDS = 1000  # of rows whose columns are remembered: rows with ever other columns must not fill the memory


@dataclass
class PairRows:
    """form: open_rm or trl.  reading: how the scored rows were read."""

    form: Literal["open_rm", "trl"]
    reading: Reading
    _as_written: Reading = field(default_factory=Reading)
    _names: dict = field(default_factory=dict)

    def row(self, scored: ScoredRow, chosen: int, rejected: int) -> tuple[dict, list[str]]:
        """(the pair, which of the row's columns are called input_<name> in it)

        It has the two answers and their prompt, the margin of their scores, their places in the row (0 is the first), what
        the chat template is given, and those columns of the row that were read as none of these.
        """
        answers, trl = scored.answers, self.form == "trl"
        sides = [answers.answers[chosen], answers.answers[rejected]]
        pair: dict = {}
        if answers.kind == "token ids":
            names = ("chosen_ids", "rejected_ids") if trl else ("chosen_input_ids", "rejected_input_ids")
            pair = {} if trl or not answers.prompt else {"prompt_input_ids": answers.prompt}
            sides = [answers.prompt + ids for ids in sides]
        else:
            names = ("chosen", "rejected")
            if answers.prompt or (trl and answers.kind == "text"):
                pair["prompt"] = answers.prompt
        pair |= dict(zip(names, sides, strict=True))
        good, bad = scored.scores[chosen], scored.scores[rejected]
        pair |= {"score_chosen": good, "score_rejected": bad} if trl else {"margin": good - bad}
        pair |= {"chosen_index": chosen, "rejected_index": rejected}
        template = template_columns(answers.template)
        if trl and "tools" in template:
            template["tools"] = json.dumps(template["tools"], ensure_ascii=False)
        pair |= template
        called = self._called(scored, pair)
        return pair | {new: scored.row[name] for name, new in called.items()}, [
            name for name in called if name != called[name]
        ]

    def _called(self, scored: ScoredRow, pair: dict) -> dict[str, str]:
        """Columns beside -> what they are called: where a name would make the pair a row of another form, input_<name>."""
        unread = plan_of(scored.row, self.reading).unread
        key = (*pair, None, *unread)
        if key not in self._names:
            if len(self._names) >= MOST_KINDS:
                self._names.clear()
            called = renamed(unread, {*TARGETS, *pair})
            if not self._is_own_form({*pair, *called.values()}):
                called = renamed(unread, {*TARGETS, *pair, *SPECIAL})
            self._names[key] = called
        return self._names[key]

    def _is_own_form(self, names: set[str]) -> bool:
        """Whether training reads a row of these columns by our own names."""
        try:
            return plan_of(dict.fromkeys(sorted(names), ""), self._as_written).form.name in OWN_NAMES
        except UserError:  # two forms fit
            return False


def renamed(names: Iterable[str], taken: set[str]) -> dict[str, str]:
    """Names that are taken -> input_<name>, or one that is free; others stay."""
    names, called = list(names), {}
    for name in names:
        new = name
        while new in taken or (new != name and new in names):
            new = f"input_{new}"
        called[name] = new
    return called


def template_columns(template: dict) -> dict:
    """What the chat template is given besides, as columns of ours."""
    kwargs = {name: value for name, value in template.items() if name != "tools"}
    tools = {"tools": template["tools"]} if "tools" in template else {}
    return tools | ({"chat_template_kwargs": kwargs} if kwargs else {})
