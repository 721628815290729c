"""What there is to see in preference data: numbers per source and overall, overlap, findings.

Everything is counted over the columns of numbers of the token cache, sorted once, never pair by pair; a million pairs
take seconds. Pairs are equal where their tokens are: the same words in another chat template are another pair. What is
not covered: near duplicates, and prompts that rows only imply (the prompt is then what the two sides share, so an
overlap of prompts can be missed; the overlap of whole sides is counted beside it).
"""

from collections import Counter

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from open_rm.data.labels import TIE
from open_rm.data.pairs import PreferenceData
from open_rm.data.tokenizer import prints_date
from open_rm.inspection import sharing
from open_rm.inspection.findings import drop_counts, find

PERCENTILES = (5, 50, 95, 99)
SCORED_SHOWN = 10


def inspect_data(train: PreferenceData, held_out: PreferenceData | None, tokenizer: PreTrainedTokenizerBase) -> dict:
    """The report: splits -> sources and overall, overlap of held-out and training data, findings as sentences."""
    splits = {"train": _inspect_split(train, tokenizer)}
    if held_out is not None:
        splits["eval"] = _inspect_split(held_out, tokenizer)
    report = {
        "splits": splits,
        "overlap": {} if held_out is None else {"sources": _overlap(train, held_out)},
        "date_in_template": train.chat and prints_date(tokenizer),
        "text_beside_template": train.kind == "text" and tokenizer.chat_template is not None,
    }
    return report | {"findings": find(report)}


def _inspect_split(data: PreferenceData, tokenizer) -> dict:
    ids, last = data.source_ids(), _scored_tokens(data)
    sources = []
    for number, facts in enumerate(data.facts):
        where = np.flatnonzero(ids == number)
        sources.append(_facts(facts) | _numbers(data, where, last, tokenizer, repeated=facts["taken"] > facts["rows"]))
    overall = {"label": "overall", "sources": len(sources)}
    for name in ("rows", "taken", "pairs", "ties", "truncated", "promptless"):
        overall[name] = sum(source[name] for source in sources)
    overall["dropped"] = dict(sum((Counter(drop_counts(source["dropped"])) for source in sources), Counter()))
    overall["skipped"] = sum(len(source["skipped"]) for source in sources)
    repeated = any(source["taken"] > source["rows"] for source in sources)
    overall |= _numbers(data, np.arange(len(data)), last, tokenizer, repeated=repeated)
    return {"sources": sources, "overall": overall}


def _facts(facts: dict) -> dict:
    names = (
        "label",
        "name",
        "rows",
        "joined",
        "taken",
        "forms",
        "ties",
        "dropped",
        "skipped",
        "truncated",
        "promptless",
    )
    names += ("read", "unread", "oddities", "held_out_form", "read_rows", "attributes")
    found = {name: facts[name] for name in names} | {"pairs": facts["kept"]}
    same = [fault for reason, fault in facts["dropped"].items() if reason.startswith("identical")]
    skipped = [row["place"] for row in facts["skipped"] if row["what"].startswith("chosen and rejected are identical")]
    found["identical_sides"] = {
        "count": sum(fault["count"] for fault in same) + len(skipped),
        "first": next(iter([fault["first"] for fault in same] + skipped), None),
    }
    return found


def _numbers(data: PreferenceData, where: np.ndarray, last: np.ndarray, tokenizer, *, repeated: bool) -> dict:
    """What the columns say about the pairs `where`.

    Args:
        last: [2, pairs] the scored token of every chosen and rejected side.
        repeated: whether the mixer's amount takes rows more than once; those are no duplicates.
    """
    if not len(where):
        return {}
    table = data.table
    chosen, rejected, shared = table.chosen_length[where], table.rejected_length[where], table.shared_length[where]
    # The shared start is in both sides, so comparing sides compares responses. Of a tie, no side is the better one.
    lead = np.sign(chosen - rejected)[data.label_probs()[where] != TIE]
    longer = float((1 + lead.mean()) / 2) if len(lead) else 0.5
    lengths = {
        "prompt": table.prompt_length[where],
        "chosen": chosen,
        "rejected": rejected,
        "chosen_response": chosen - shared,
        "rejected_response": rejected - shared,
    }
    return {
        **_repeats(data, where, repeated),
        "chosen_longer": float((lead > 0).mean()) if len(lead) else 0.0,
        "equally_long": float((lead == 0).mean()) if len(lead) else 0.0,
        "length_baseline": {  # equally long pairs count half
            "pairs": len(lead),
            "rule": "longer is better" if longer >= 0.5 else "shorter is better",
            "accuracy": max(longer, 1 - longer),
            "longer_is_better": longer,
            "shorter_is_better": 1 - longer,
        },
        "lengths": {name: _percentiles(values) for name, values in lengths.items()},
        "shared": _shared(data, where) | {"step": sharing.of_steps(data, where, tokenizer)},
        "scored": _scored(data, where, last[:, where], tokenizer),
    }


def _percentiles(values: np.ndarray) -> dict[str, int]:
    found = np.percentile(values, PERCENTILES, method="inverted_cdf")
    return {f"p{p}": int(value) for p, value in zip(PERCENTILES, found, strict=True)} | {"max": int(values.max())}


def first_with_same(*keys: np.ndarray) -> np.ndarray:
    """[n] for each position the first one at which all keys (each [n]) are the same."""
    order = np.lexsort(keys)  # stable: the first of equal ones stays first
    new = np.zeros(len(order), bool)
    new[:1] = True
    for key in keys:
        new[1:] |= key[order[1:]] != key[order[:-1]]
    first = np.empty(len(order), np.int64)
    first[order] = order[np.flatnonzero(new)[np.cumsum(new) - 1]]
    return first


def _repeats(data: PreferenceData, where: np.ndarray, repeated: bool) -> dict:
    """duplicates: pairs that came before.  contradictory: pairs that came before the other way round, counted once; a tie
    contradicts none."""
    chosen, rejected = data.table.chosen_id[where], data.table.rejected_id[where]
    tie = data.label_probs()[where] == TIE
    own = np.arange(len(where))
    same = first_with_same(chosen, rejected)
    duplicate = same != own
    if repeated:  # a second copy that was asked for has its place, too; one row's pairs differ in their sides
        places = data.dataset.with_format("arrow", columns=["place"])[:]["place"].cast(pa.large_string())
        place = places.combine_chunks().dictionary_encode().indices.to_numpy()[where].astype(np.int64)
        duplicate &= first_with_same(chosen, rejected, place, data.source_ids()[where]) == own
    first_of_both = first_with_same(np.minimum(chosen, rejected), np.maximum(chosen, rejected), tie)
    contradictory = (first_with_same(chosen, rejected, tie) == own) & (first_of_both != own) & ~tie

    def described(found: np.ndarray, other: np.ndarray) -> dict:
        first = None
        if found.any():
            i = int(np.flatnonzero(found)[0])
            first = dict(zip(("place", "other"), data.places(where[[i, other[i]]].tolist()), strict=True))
        return {"count": int(found.sum()), "first": first}

    return {"duplicates": described(duplicate, same), "contradictory": described(contradictory, first_of_both)}


def _shared(data: PreferenceData, where: np.ndarray) -> dict:
    """Tokens of all sequences, and tokens that shared_prefix computes: pair by pair, and with all pairs of a prompt
    together (see dealing.py, whose arithmetic this is for all prompts at once)."""
    table = data.table
    chosen, rejected, shared = table.chosen_length[where], table.rejected_length[where], table.shared_length[where]
    alone = chosen + rejected - shared
    cut, group = np.unique(table.cut_prompt_ids(where), return_inverse=True)
    prefix = np.full(len(cut), np.iinfo(np.int64).max)
    np.minimum.at(prefix, group, np.minimum(table.prompt_length[where], shared))
    both, ids = np.tile(group, 2), np.concatenate((table.chosen_id[where], table.rejected_id[where]))
    distinct = first_with_same(both, ids) == np.arange(2 * len(where))
    own = (np.concatenate((chosen, rejected)) - prefix[both])[distinct]
    together = prefix + np.bincount(both[distinct], own, len(cut)).astype(np.int64)
    apart = np.bincount(group, alone, len(cut)).astype(np.int64)
    by_prompt = int(np.where(np.bincount(group) > 1, np.minimum(together, apart), apart).sum())
    tokens, by_pair = int((chosen + rejected).sum()), int(alone.sum())
    return {
        "tokens": tokens,
        "share": int(shared.sum()) / tokens,
        "by_pair": {"tokens": by_pair, "ratio": tokens / by_pair},
        "by_prompt": {"tokens": by_prompt, "ratio": tokens / by_prompt},
        "prompts": len(np.unique(table.prompt_id[where])),
    }


def _scored_tokens(data: PreferenceData) -> np.ndarray:
    """[2, pairs] the last token of every side, read where Arrow's lists end; nothing else is read."""
    sides = []
    for name in ("chosen_input_ids", "rejected_input_ids"):
        chunks = data.dataset.with_format("arrow", columns=[name])[:][name].chunks
        ends = [
            chunk.values.to_numpy(zero_copy_only=False)[chunk.offsets.to_numpy()[1:] - 1]
            for chunk in chunks
            if len(chunk)
        ]
        sides.append(np.concatenate(ends))
    return np.stack(sides)


def _scored(data: PreferenceData, where: np.ndarray, last: np.ndarray, tokenizer) -> dict:
    ids, counts = np.unique(last, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    others = np.flatnonzero((last != ids[order[0]]).any(axis=0))
    return {
        "distinct": len(ids),
        "tokens": [
            {
                "id": int(ids[i]),
                "text": tokenizer.decode([int(ids[i])]),
                "sides": int(counts[i]),
                "first": data.places([int(where[np.flatnonzero((last == ids[i]).any(axis=0))[0]])])[0],
            }
            for i in order[:SCORED_SHOWN]
        ],
        "first_other": data.places([int(where[others[0]])])[0] if len(others) else None,
    }


def _overlap(train: PreferenceData, held_out: PreferenceData) -> list[dict]:
    """Held-out prompts and whole sides that are in the training data, per held-out source."""
    table, trained = held_out.table, train.table
    prompt = np.isin(table.prompt_id, trained.prompt_id)
    trained_sides = np.concatenate((trained.chosen_id, trained.rejected_id))
    side = np.isin(table.chosen_id, trained_sides) | np.isin(table.rejected_id, trained_sides)
    found, ids = [], held_out.source_ids()
    for number, label in enumerate(held_out.labels):
        own = ids == number
        first = None
        if (own & (prompt | side)).any():
            i = int(np.flatnonzero(own & (prompt if (own & prompt).any() else side))[0])
            if prompt[i]:
                there = trained.prompt_id == table.prompt_id[i]
            else:
                there = np.isin(trained_sides, (table.chosen_id[i], table.rejected_id[i])).reshape(2, -1).any(axis=0)
            first = {
                "eval": held_out.places([i])[0],
                "train": train.places([int(np.flatnonzero(there)[0])])[0],
            }
        found.append(
            {
                "label": label,
                "prompts": len(np.unique(table.prompt_id[own & prompt])),
                "of_prompts": len(np.unique(table.prompt_id[own])),
                "pairs": int((own & prompt).sum()),
                "pairs_with_a_side": int((own & side).sum()),
                "first": first,
            }
        )
    return found
