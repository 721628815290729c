"""Rows to token ids, a block at a time, in this process or several; what happened to each row is counted.

read (rows.py) -> render, encode (encoding.py) -> judge (faults, lengths) -> a record batch of the cache's columns.
A block holds a thousand rows, so memory does not grow with the data; results come back in the order of the rows, so the
number of processes changes nothing but the time.
"""

import gc
import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from open_rm.data import encoding
from open_rm.data.counts import Counts
from open_rm.data.encoding import PairIds, PairText
from open_rm.data.printed import check_printed
from open_rm.data.rows import Preference, Reading, Row, read_row
from open_rm.data.schema import Kept, content_id, list_id, record_batch
from open_rm.data.tokenizer import reward_id_of, reward_token_of
from open_rm.errors import UserError
from open_rm.flags import DataFlags

# Text of more characters is dropped unread: a tokenizer may need minutes for it, and it is too long in any case.
LONGEST_TEXT = 1_000_000
CHARACTERS_PER_TOKEN = 20
IMPLIED_PROMPT_TOKENS = 8


class Taken(NamedTuple):
    """A row of a block: where it stands, the row or the UserError that reading it gave, and how often it is taken.

    before: how often it was already taken, since a row that is taken very often is dealt to several blocks.
    """

    place: str
    row: object
    times: int
    before: int = 0


Block = list[Taken]


@dataclass(frozen=True)
class Policy:
    """What decides how a row becomes token ids.

    overlength: filter or truncate.
    max_token_length: of a side.  max_prompt_token_length: of a prompt.
    """

    tokenizer: PreTrainedTokenizerBase
    reading: Reading
    max_token_length: int
    max_prompt_token_length: int
    overlength: str

    @classmethod
    def of(cls, flags: DataFlags, tokenizer: PreTrainedTokenizerBase, reading: Reading) -> "Policy":
        return cls(tokenizer, reading, flags.max_token_length, flags.max_prompt_token_length, flags.overlength)

    @property
    def most_characters(self) -> int:
        """Of a text that is encoded at all."""
        return max(LONGEST_TEXT, CHARACTERS_PER_TOKEN * self.max_token_length)


@dataclass(slots=True)
class Candidate:
    """A pair on its way to token ids. row: the number of its row in the block.

    text: rendered; None where the row holds token ids.  ids: encoded; None before, or where the text is too long for it.
    """

    row: int
    pair: Preference
    text: PairText | None = None
    ids: PairIds | None = None


@dataclass
class Prepared:
    """A block's outcome. batch: kept pairs.  counts: what happened to its rows.  bad: (place, what is wrong)."""

    batch: pa.RecordBatch | None = None
    counts: Counts = field(default_factory=Counts)
    bad: list[tuple[str, str]] = field(default_factory=list)


def kind_of(block: Block, reading: Reading) -> str | None:
    """The kind of the first row of a block that can be read; the others must be of it too."""
    for _, row, *_ in block:
        try:
            if not isinstance(row, UserError) and (pairs := read_row(row, reading).pairs):
                return pairs[0].kind
        except UserError:
            pass
    return None


def prepare_block(block: Block, kind: str | None, source: int, policy: Policy) -> Prepared:
    """Everything that happens to the rows of one block.

    kind: what the rows must be (rows.Preference.kind), since special tokens are written differently; None: unknown yet.
    source: the number that its pairs carry.
    """
    faults: dict[int, str] = {}  # what is wrong, by number of the row: one bad pair makes its whole row bad
    rows = _read(block, kind, policy, faults)
    candidates = _render(rows, policy.tokenizer, faults)
    _encode(candidates, policy)
    candidates, alike = _without_ties(candidates, rows)
    for one in candidates:
        if one.ids and one.row not in faults and (fault := _fault(one.ids, policy.tokenizer)):
            faults[one.row] = fault
    done = Prepared(bad=[(block[row].place, faults[row]) for row in sorted(faults)])
    good = [(block[number], row) for number, row in rows.items() if number not in faults]
    done.counts.add_rows([(one.place, one.row, row, one.times) for one, row in good])
    done.counts.ties += sum(block[one.row].times for one in alike if one.row not in faults)
    kept = _judge([one for one in candidates if one.row not in faults], block, source, policy, done.counts)
    done.batch = record_batch(kept, source)
    return done


def _without_ties(candidates: list[Candidate], rows: dict[int, Row]) -> tuple[list[Candidate], list[Candidate]]:
    """(the others, those that are ties: their two sides are the same tokens, in a row of several pairs or one that says so)"""
    several = {number for number, row in rows.items() if len(row.pairs) + row.ties > 1}
    same = [one for one in candidates if one.ids and one.ids.chosen == one.ids.rejected]
    alike = [one for one in same if one.row in several or one.pair.is_tie]
    gone = set(map(id, alike))
    return [one for one in candidates if id(one) not in gone], alike


def _read(block: Block, kind: str | None, policy: Policy, faults: dict[int, str]) -> dict[int, Row]:
    """The rows that can be read, by their number."""
    rows = {}
    for number, (_, row, *_) in enumerate(block):
        try:
            if isinstance(row, UserError):
                raise row
            found = read_row(row, policy.reading)
            _check_kind(found.pairs, kind, policy.tokenizer)
            rows[number] = found
        except UserError as error:
            faults[number] = str(error)
    return rows


def _render(rows: dict[int, Row], tokenizer: PreTrainedTokenizerBase, faults: dict[int, str]) -> list[Candidate]:
    """Their pairs as text, in one call for the block; rows of token ids as they are."""
    candidates = [Candidate(number, pair) for number, row in rows.items() for pair in row.pairs]
    if candidates and candidates[0].pair.kind == "token ids":
        for one in candidates:
            one.ids = _as_given(one.pair, tokenizer)
        return candidates
    parts = [(one.pair.prompt, one.pair.chosen, one.pair.rejected, one.pair.template) for one in candidates]
    for one, text in zip(candidates, encoding.render_pairs(tokenizer, parts), strict=True):
        text = _checked_text(text) if isinstance(text, PairText) else text
        if isinstance(text, PairText) and text.chat:
            text = _checked_print(one.pair, text, tokenizer)
        if isinstance(text, UserError):
            faults.setdefault(one.row, str(text))
        else:
            one.text = text
    return [one for one in candidates if one.text is not None]


def _checked_print(pair: Preference, text: PairText, tokenizer: PreTrainedTokenizerBase) -> PairText | UserError:
    try:
        check_printed(tokenizer, pair.prompt, pair.chosen, text.chosen, pair.template)
        check_printed(tokenizer, pair.prompt, pair.rejected, text.rejected, pair.template)
    except UserError as error:
        return error
    return text


def _encode(candidates: list[Candidate], policy: Policy) -> None:
    """Token ids of every text that is not too long for it, in one call."""
    limit = policy.most_characters
    texts = [one for one in candidates if one.text and max(len(one.text.chosen), len(one.text.rejected)) <= limit]
    for one, ids in zip(texts, encoding.encode_pairs(policy.tokenizer, [one.text for one in texts]), strict=True):
        one.ids = ids


def _judge(candidates: list[Candidate], block: Block, source: int, policy: Policy, counts: Counts) -> list[Kept]:
    """What is kept, as often as its row is taken. What is not is counted."""
    for one in candidates:  # before the others, as their drops are found first
        if one.ids is None:
            place, _, times, _ = block[one.row]
            counts.drop(f"a side > {policy.most_characters} characters", times, place)
    kept, names = [], [name for name, _ in policy.reading.attributes]
    for one in candidates:
        if one.ids is None:
            continue
        place, _, times, before = block[one.row]
        ids, reason = _within_limits(one.ids, policy)
        if reason:
            counts.drop(reason, times, place)
            continue
        if ids is not one.ids:
            counts.truncated += times
        if _lost_its_prompt(one.pair, one.ids, ids):
            counts.promptless += times
        counts.add_label(one.pair.label_prob, times)
        counts.add_attributes(names, one.pair.attributes, times)
        lists = [list_id(source, place, before + i) for i in range(times)]
        kept += _copies(one.pair, ids, _prompt_id(one.pair, one.ids), place, lists)
    return kept


def _copies(pair: Preference, ids: PairIds, prompt_id: int, place: str, lists: list[int]) -> list[Kept]:
    """A pair as the cache takes it, once for each list that it is in."""
    return [
        Kept(ids, prompt_id, pair.margin, place, pair.label_prob, one, pair.levels, pair.attributes) for one in lists
    ]


def prepare_blocks(
    blocks: Iterable[tuple[Block, str | None]], source: int, policy: Policy, num_proc: int
) -> Iterator[tuple[Block, Prepared]]:
    """`prepare_block` over (block, kind) in order, in this process or in `num_proc` others."""
    if num_proc == 1:
        # Two threads: while one encodes, for which Rust lets go of Python's lock, the other reads and renders.
        pool, work, given = ThreadPoolExecutor(2), prepare_block, (source, policy)
    else:
        # spawn: a fork would copy the threads' locks of torch and of the tokenizer
        context = multiprocessing.get_context("spawn")
        pool, work, given = ProcessPoolExecutor(num_proc, context, _start_worker, (policy, source)), _work, ()
    waiting, thresholds = deque(), _collect_rarely()
    try:
        for block, kind in blocks:
            waiting.append((block, kind, pool.submit(work, block, kind, *given)))
            if len(waiting) > 2 * num_proc:  # more would pile up in memory
                yield _outcome(*waiting.popleft(), source, policy)
        while waiting:
            yield _outcome(*waiting.popleft(), source, policy)
    except BrokenProcessPool as error:
        raise UserError(
            "a process that tokenized was ended from outside, most often for want of memory; lower --num_proc"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        gc.set_threshold(*thresholds)


def _outcome(block: Block, kind: str | None, result: Future, source: int, policy: Policy) -> tuple[Block, Prepared]:
    try:
        return block, result.result()
    except RecursionError:  # a row is nested too deeply to be sent to another process
        return block, prepare_block(block, kind, source, policy)


def _collect_rarely() -> tuple[int, int, int]:
    """Collect garbage rarely: rows have no reference cycles, and searching for them took a fifth of the time.

    Returns the thresholds that were set before.
    """
    before = gc.get_threshold()
    gc.set_threshold(100_000, 50, 1000)
    return before


def _start_worker(policy: Policy, source: int) -> None:
    global _work_with
    _collect_rarely()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _work_with = (source, policy)


def _work(block: Block, kind: str | None) -> Prepared:
    return prepare_block(block, kind, *_work_with)


def _check_kind(pairs: list[Preference], kind: str | None, tokenizer: PreTrainedTokenizerBase) -> None:
    for pair in pairs:
        if kind is not None and pair.kind != kind:
            texts = " (--as_messages makes messages of text)" if "text" in (kind, pair.kind) else ""
            raise UserError(
                f"the rows before are {kind} and this one is {pair.kind}; train on one kind at a time{texts}"
            )
        if pair.kind == "token ids" and (largest := max(max(pair.chosen), max(pair.rejected))) >= len(tokenizer):
            raise UserError(
                f"token id {largest} is beyond the tokenizer's {len(tokenizer)}; is it the right tokenizer?"
            )


def _as_given(pair: Preference, tokenizer: PreTrainedTokenizerBase) -> PairIds:
    """A pair of token ids, with the reward token at the end where there is one."""
    reward_id = reward_id_of(tokenizer)
    end = [] if reward_id is None else [reward_id]
    sides = (side if side[-1:] == end else side + end for side in (pair.chosen, pair.rejected))
    size = encoding.shared_prefix_length(pair.chosen, pair.rejected)
    return PairIds(pair.prompt or pair.chosen[:size], *sides)


def _checked_text(text: PairText) -> PairText | UserError:
    fault = fault_of_text(text.prompt + text.chosen + text.rejected)
    return text if fault is None else UserError(fault)


def fault_of_text(text: str) -> str | None:
    """Why a text cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return "the text holds half a surrogate pair, which is no character; remove it"
    return None


def _fault(pair: PairIds, tokenizer: PreTrainedTokenizerBase) -> str | None:
    if pair.chosen == pair.rejected:
        return "chosen and rejected are identical as tokens, so the pair prefers nothing; remove the row"
    return fault_of_ids(pair.chosen, tokenizer) or fault_of_ids(pair.rejected, tokenizer)


def fault_of_ids(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why a sequence of token ids cannot be scored."""
    if tokenizer.pad_token_id in ids:
        pad = tokenizer.pad_token
        return f"the text contains the pad token {pad!r}, which must never occur in text; remove it from the row"
    reward_id = reward_id_of(tokenizer)
    if reward_id is not None and ids.count(reward_id) != 1:
        token = reward_token_of(tokenizer)
        return f"the text contains the reward token {token!r} itself; remove it from the row, or name another"
    return None


def _within_limits(pair: PairIds, policy: Policy) -> tuple[PairIds, str | None]:
    """(the pair as it is trained on, why it is dropped or None)"""
    limits = {
        "max_token_length": policy.max_token_length,
        "max_prompt_token_length": policy.max_prompt_token_length,
    }
    reason = None
    if len(pair.prompt) > policy.max_prompt_token_length:
        reason = f"prompt > {policy.max_prompt_token_length} tokens"
    elif max(len(pair.chosen), len(pair.rejected)) > policy.max_token_length:
        reason = f"a side > {policy.max_token_length} tokens"
    if reason is None or policy.overlength == "filter":
        return pair, reason
    cut = encoding.truncate(pair, bos_token_id=policy.tokenizer.bos_token_id, **limits)
    return cut, "identical after truncation" if cut.chosen == cut.rejected else None


def _names_prompt(pair: Preference, ids: PairIds) -> bool:
    """True if the row names a prompt, or if both texts share their first 8 tokens or more (then that is the prompt).

    Without a prompt `ids.prompt` is what the chat template writes first, or where two texts happen to begin alike.
    """
    return bool(pair.prompt) or (pair.kind != "messages" and len(ids.prompt) >= IMPLIED_PROMPT_TOKENS)


def _lost_its_prompt(pair: Preference, ids: PairIds, cut: PairIds) -> bool:
    """Whether truncation left nothing of the prompt but, at most, BOS."""
    return _names_prompt(pair, ids) and len(cut.prompt) <= 1 < len(ids.prompt)


def _prompt_id(pair: Preference, ids: PairIds) -> int:
    """Of the prompt before it is cut; pairs without one are not of the same prompt."""
    return content_id(np.array(ids.prompt if _names_prompt(pair, ids) else ids.chosen + ids.rejected, np.int32))
