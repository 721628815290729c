"""Forms of rows: what makes a row of our own columns a comparison, and how a form of other columns is described.

A form says which columns a row must have and where our columns stand in them, in the language of lookup.py, which
--column_map speaks too. A row is of the form with the most special columns; --dataset_format names one. Public data sets
stand in public_sets.py, a few lines each.
"""

from dataclasses import dataclass, field

from open_rm.errors import UserError

# Our columns that make a comparison, by what decides it. The first whose columns are all there is the row's.
SHAPES = {
    "token ids": ("chosen_input_ids", "rejected_input_ids"),
    "conversations": ("messages", "rejected_messages"),
    "answers": ("messages", "chosen_response", "rejected_response"),
    "last answer": ("messages", "rejected_response"),
    "ranked": ("responses",),
    "winner": ("response_a", "response_b", "winner"),
    "strength": ("response_a", "response_b", "strength"),
    "two scores": ("response_a", "response_b", "score_a", "score_b"),
    "pairs": ("chosen", "rejected"),
    "rows": ("prompt", "response", "score"),
}
# The same of rows that are only scored, which need not say who won; looked at behind those.
SCORED_SHAPES = {
    "two answers": ("response_a", "response_b"),
    "one answer": ("response",),
    "conversation": ("messages",),
}
# Of these, what says who won.
DECIDING = ("winner", "strength", "score_a", "score_b", "score", "scores", "margin")
# How sure it is that chosen is the better one: a probability, or how many voted for each.
VOTES = ("n_chosen", "n_rejected")
SOFT = ("label_prob", *VOTES)
# Our columns that may stand beside any of them; those of SOFT beside two sides alone.
OPTIONAL = ("system", "history", "prompt", "tools", "chat_template_kwargs", "margin", *SOFT)
TARGETS = (
    *OPTIONAL[:3],
    *(name for names in SHAPES.values() for name in names),
    *OPTIONAL[3:],
    "scores",
    "prompt_input_ids",
)
TARGETS = tuple(dict.fromkeys(TARGETS))


@dataclass(frozen=True)
class Form:
    """One form of rows.

    name: what --dataset_format takes.  says: what the log calls it; None: by what the row turns out to be.
    needs: columns that a row must have.
    reads: our column -> where it stands. What a row lacks is left out.
    labels: value of the winner column, as lower-case text -> a, b or tie, where the set has words of its own.
    leaves: columns that are not read on purpose, for they repeat or explain what is read.
    chat: texts become messages, for they are what a user and a chat model said.
    lower_is_better: its scores are ranks.
    marks: what stands before a user's and before a model's turn in a prompt of text.
    turn: the column that says how many turns were judged; later ones are cut off.
    tie: a column, and the value that makes a row a tie.
    gaps: answers without text or score are left out of a list, and counted.
    refuses: why rows of this form cannot be trained on.
    held_out: a benchmark, for --dataset_mixer_eval_list.
    sets: names of public sets in this form, as a mixer list takes them, each with a split.
    source: where the columns were looked up.  note: what a user should know.
    """

    name: str
    needs: tuple[str, ...]
    reads: dict[str, str]
    says: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    leaves: tuple[str, ...] = ()
    chat: bool = False
    lower_is_better: bool = False
    marks: tuple[str, str] | None = None
    turn: str | None = None
    tie: tuple[str, str] | None = None
    gaps: bool = False
    refuses: str | None = None
    held_out: bool = False
    sets: tuple[tuple[str, str], ...] = ()
    source: str = ""
    note: str = ""


def _own(name: str, shape: str, *more: str, says: str | None = None) -> Form:
    """A form of our own columns."""
    needs = (SHAPES | SCORED_SHAPES)[shape]
    return Form(name, needs, {ours: ours for ours in (*needs, *more)}, says)


# Read by our own names, in whatever files they stand.
OWN_FORMS = (
    _own("pairs", "pairs"),
    _own("token_ids", "token ids", "prompt_input_ids", says="token ids"),
    _own("rejected_messages", "conversations", says="messages + rejected_messages"),
    _own("rejected_response", "last answer", says="messages + rejected_response"),
    _own("chosen_response", "answers", says="messages + chosen_response + rejected_response"),
    _own("ranked", "ranked", "scores", says="ranked responses"),
    _own("labelled", "winner", says="labelled A/B"),
    _own("strength", "strength", says="A/B with a strength"),
    _own("two_scores", "two scores", says="A/B with two scores"),
    _own("answers", "rows", says="one answer a row, joined by prompt"),
)
# Of rows that are only scored: a row of a form that training reads is of that one.
SCORED_FORMS = (
    _own("two_answers", "two answers", says="two answers"),
    _own("one_answer", "one answer", says="one answer a row"),
    _own("conversation", "conversation", says="one conversation a row"),
)
OWN_NAMES = frozenset(form.name for form in (*OWN_FORMS, *SCORED_FORMS))


def form_named(name: str, forms: dict[str, Form]) -> Form:
    """The form that --dataset_format names."""
    if name not in forms:
        raise UserError(
            f"--dataset_format {name}: no form is called so; they are {', '.join(forms)} and auto (docs/data.md)"
        )
    return forms[name]
