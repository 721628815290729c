"""Rows to token ids, a block at a time, ready to be scored: read, rendered, encoded, judged for their length.

A block is a fixed number of rows of the input, whatever becomes of them, so that a run that goes on, or one that computes
another part, makes the same blocks and so the same bits.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from open_rm.data import encoding
from open_rm.data.answers import Answers, read_answers
from open_rm.data.encoding import PairIds
from open_rm.data.preparation import CHARACTERS_PER_TOKEN, LONGEST_TEXT, fault_of_ids, fault_of_text
from open_rm.data.printed import check_printed
from open_rm.data.reading import Reading
from open_rm.data.tokenizer import reward_id_of
from open_rm.errors import UserError
from open_rm.scoring.scorer import Scorer

# What a conversation without a prompt is told to do, in training and here.
AS_TEXT_IN_TRAINING = "train on text without --as_messages"
AS_TEXT = "pass --as_messages False where the text is a conversation that was rendered"
Raw = tuple[str, object]  # place, and the row or the UserError that reading it gave


@dataclass
class EncodedRow:
    """A row whose answers are token ids. ids: one an answer; None where it is not scored (empty, or too long)."""

    place: str
    row: dict
    answers: Answers
    ids: list[list[int] | None] = field(default_factory=list)
    overlength: list[bool] = field(default_factory=list)


@dataclass(frozen=True)
class Block:
    """size: rows of the input.  digest: of these and all rows before.  bad: (place, what is wrong), of rows left out.
    rows, judged: the others, for the model and for its judge, where there is one."""

    size: int
    digest: str
    rows: list[EncodedRow]
    judged: list[EncodedRow] | None
    bad: list[tuple[str, str]]


@dataclass(frozen=True)
class Encoder:
    """How rows become token ids for one reward model.

    overlength: null or truncate.  cut_to: most tokens of a sequence and of a prompt where they are cut; None: what the scorer
    says, which is what training cut to.
    """

    scorer: Scorer
    reading: Reading
    overlength: str
    cut_to: tuple[int, int] | None = None

    def rows(self, raw: list[Raw]) -> tuple[dict[int, EncodedRow], dict[int, str]]:
        """(rows that can be scored, what is wrong with the others), by their numbers"""
        rows, faults = {}, {}
        for number, (place, row) in enumerate(raw):
            try:
                if isinstance(row, UserError):
                    raise row
                rows[number] = EncodedRow(place, row, self._checked(read_answers(row, self.reading)))
            except UserError as error:
                faults[number] = str(error).replace(AS_TEXT_IN_TRAINING, AS_TEXT)
        texts = self._render(rows, faults)
        self._encode(rows, texts, faults)
        return {number: row for number, row in rows.items() if number not in faults}, faults

    def _checked(self, answers: Answers) -> Answers:
        name = self.scorer.name
        if answers.kind == "messages" and not self.scorer.chat:
            raise UserError(
                f"the row is messages, and {name} scores plain text; give it text, or a --chat_template_name to render messages"
            )
        return answers

    def _render(self, rows: dict[int, EncodedRow], faults: dict[int, str]) -> dict[tuple[int, int], str]:
        """(number of the row, of the answer) -> the complete text; conversations of one template together."""
        texts: dict[tuple[int, int], str] = {}
        together: dict[str, list[tuple[int, int]]] = {}
        for number, row in rows.items():
            answers = row.answers
            for i, answer in enumerate(answers.answers):
                if answer is None or answers.kind == "token ids":
                    continue
                if answers.kind == "messages":
                    together.setdefault(repr(answers.template) if answers.template else "", []).append((number, i))
                elif self.scorer.chat:
                    texts[number, i] = answers.complete(i)
                else:
                    texts[number, i] = self.scorer.complete(answers.prompt, answer)
        for members in together.values():
            chats = [rows[number].answers.complete(i) for number, i in members]
            template = rows[members[0][0]].answers.template
            texts_of = encoding.render_conversations(self.scorer.tokenizer, chats, template)
            for (number, i), text in zip(members, texts_of, strict=True):
                try:
                    if isinstance(text, UserError):
                        raise text
                    side, prompt = rows[number].answers.answers[i], rows[number].answers.prompt
                    check_printed(self.scorer.tokenizer, prompt, side, text, template)
                    texts[number, i] = text
                except UserError as error:
                    faults.setdefault(number, str(error))
        for (number, _), text in texts.items():
            if number not in faults and (fault := fault_of_text(text)):
                faults[number] = fault
        return texts

    def _encode(self, rows: dict[int, EncodedRow], texts: dict[tuple[int, int], str], faults: dict[int, str]) -> None:
        most = max(LONGEST_TEXT, CHARACTERS_PER_TOKEN * self.scorer.max_token_length)
        longest, longest_prompt = self._limits
        short = [key for key, text in texts.items() if key[0] not in faults and len(text) <= most]
        ids = dict(zip(short, self.scorer.encode_texts([texts[key] for key in short]), strict=True))
        tokenizer = self.scorer.tokenizer
        own_pad = tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id)
        for number, row in rows.items():
            if number in faults:
                continue
            if row.answers.kind == "token ids":
                row.ids = [_as_given(row.answers.complete(i), tokenizer) for i in range(len(row.answers.answers))]
            else:
                row.ids = [ids.get((number, i)) for i in range(len(row.answers.answers))]
            too_many = [one is not None and len(one) > longest for one in row.ids]
            row.overlength = [
                cut or (one is None and answer is not None)  # more characters than are encoded at all
                for cut, one, answer in zip(too_many, row.ids, row.answers.answers, strict=True)
            ]
            if fault := self._fault(row, own_pad=own_pad):
                faults[number] = fault
            elif self.overlength == "truncate" and any(len(one) > longest_prompt for one in row.ids if one is not None):
                whole, row.ids = row.ids, self._cut(row)
                row.overlength = [a != b or long for a, b, long in zip(whole, row.ids, row.overlength, strict=True)]
            else:
                row.ids = [None if long else one for one, long in zip(row.ids, row.overlength, strict=True)]

    @property
    def _limits(self) -> tuple[int, int]:
        """Most tokens of an answer with its prompt, and of a prompt, which training cuts on its own."""
        if self.overlength == "truncate":
            return self.cut_to or self.scorer.cut_to
        return self.scorer.max_token_length, self.scorer.max_token_length

    def _fault(self, row: EncodedRow, *, own_pad: bool) -> str | None:
        """Why a row cannot be scored, by its token ids. own_pad: the pad token is none that text may hold."""
        tokenizer = self.scorer.tokenizer
        found = [ids for ids in row.ids if ids is not None]
        if not all(found):
            return "an answer has no tokens; correct or remove the row"
        if row.answers.kind == "token ids" and (largest := max(map(max, found))) >= len(tokenizer):
            return f"token id {largest} is beyond the tokenizer's {len(tokenizer)}; is it the right tokenizer?"
        return next((fault for ids in found if own_pad and (fault := fault_of_ids(ids, tokenizer))), None)

    def _cut(self, row: EncodedRow) -> list[list[int] | None]:
        """The answers within the limit as training cuts a pair's sides: each beside the longest of the others."""
        longest, longest_prompt = self._limits
        order = sorted((i for i, ids in enumerate(row.ids) if ids is not None), key=lambda i: -len(row.ids[i]))
        cut: list[list[int] | None] = [None] * len(row.ids)
        for i in order:
            beside = next((j for j in order if j != i), i)
            prompt = self._prompt_ids(row, i, beside)
            # of one text alone it is not known where its prompt ends
            most = longest if beside == i and not row.answers.prompt else longest_prompt
            limits = {"max_token_length": longest, "max_prompt_token_length": most}
            pair = PairIds(prompt, row.ids[i], row.ids[beside])
            cut[i] = encoding.truncate(pair, bos_token_id=self.scorer.tokenizer.bos_token_id, **limits).chosen
        return cut

    def _prompt_ids(self, row: EncodedRow, one: int, other: int) -> list[int]:
        """Token ids of the prompt alone, which can differ in its last from what it is before an answer."""
        answers, tokenizer = row.answers, self.scorer.tokenizer
        if answers.kind == "token ids":
            size = encoding.shared_prefix_length(row.ids[one], row.ids[other])
            return answers.prompt or row.ids[one][:size]
        parts = (answers.prompt, answers.answers[one], answers.answers[other], answers.template)
        [text] = encoding.render_pairs(tokenizer, [parts])
        return encoding.encode_pairs(tokenizer, [text])[0].prompt


def _as_given(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids, with the reward token at the end where there is one."""
    reward_id = reward_id_of(tokenizer)
    return ids if reward_id is None or ids[-1] == reward_id else [*ids, reward_id]


def skip(rows: Iterator[Raw], *, size: int, done: int) -> str:
    """Read over the first `done` rows; the digest of their blocks of `size`."""
    digest = ""
    for raw in batched(itertools.islice(rows, done), size):
        digest = digest_of(digest, raw)
    return digest


def blocks(
    rows: Iterable[Raw], encoder: Encoder, judge: Encoder | None, *, size: int, digest: str = ""
) -> Iterator[Block]:
    """Blocks of `size` rows. digest: of the blocks before.

    Raises:
        UserError: the input cannot be read on.
    """
    for raw in batched(rows, size):
        digest = digest_of(digest, raw)
        good, faults = encoder.rows(raw)
        judged, more = judge.rows(raw) if judge else ({}, {})
        faults = {number: f"{what} (--judge)" for number, what in more.items()} | faults
        yield Block(
            len(raw),
            digest,
            [row for number, row in good.items() if number not in faults],
            [row for number, row in judged.items() if number not in faults] if judge else None,
            [(raw[number][0], faults[number]) for number in sorted(faults)],
        )


def batched(rows: Iterable[Raw], size: int) -> Iterator[list[Raw]]:
    """Lists of `size` rows; the last may be shorter."""
    rows = iter(rows)
    while block := list(itertools.islice(rows, size)):
        yield block


def digest_of(before: str, raw: list[Raw]) -> str:
    """sha256 over a block's rows and the digest of all before it, by which a run that goes on knows its input again."""
    digest = hashlib.sha256(before.encode())
    for _, row in raw:
        digest.update((str(row) if isinstance(row, UserError) else json.dumps(row, default=repr)).encode())
    return digest.hexdigest()
