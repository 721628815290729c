"""What a training step computes at each level of sharing, and the headers that prompts begin with.

Counted from the columns of numbers, for steps that are drawn as training draws them and each computed in one micro-batch: the
most that sharing can save. Smaller micro-batches compute a header once each.
"""

import numpy as np
from transformers import PreTrainedTokenizerBase

from open_rm.batching.headers import find_headers
from open_rm.batching.layouts import LEAST_HEADER
from open_rm.batching.steps import draw_steps
from open_rm.batching.work import units_of, work_of
from open_rm.data.pairs import PreferenceData

PAIRS, STEPS = 256, 8  # of a step, and how many are drawn
LOOKED_AT = 20_000  # pairs in which headers are counted, evenly spread
SHOWN, WORDS = 5, 12  # headers, and words of each


def of_steps(data: PreferenceData, where: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> dict:
    """pairs of a step; tokens of its sequences, by_prompt with each prompt shared by its answers, by_header with what prompts
    have in common at their start shared too: means over the steps. headers: the most frequent ones of the pairs `where`.

    In terms of what training logs of a step (training/metrics.py): by_header / tokens is its perf/distinct_token_fraction,
    1 - by_prompt / tokens its perf/prompt_saving and (by_prompt - by_header) / tokens its perf/header_saving.
    """
    counts = []
    for drawn in draw_steps(len(where), min(PAIRS, len(where)), min(STEPS * PAIRS, len(where)), seed=1):
        counts.append(_tokens(where[drawn], data))
    tokens, by_prompt, by_header = (round(mean) for mean in np.mean(counts, axis=0))
    looked_at = where[np.linspace(0, len(where) - 1, min(len(where), LOOKED_AT)).astype(int)]
    found = {"pairs": min(PAIRS, len(where)), "tokens": tokens, "by_prompt": by_prompt, "by_header": by_header}
    return found | {"headers": _headers(looked_at, data, tokenizer)}


def _tokens(indices: np.ndarray, data: PreferenceData) -> tuple[int, int, int]:
    """Tokens of a step's sequences, with prompts shared, and with headers shared too."""
    table = data.table
    tokens = int((table.chosen_length[indices] + table.rejected_length[indices]).sum())
    units = units_of(indices, table, "shared_prefix", len(indices))
    by_prompt = int(work_of(units, table, "shared_prefix").tokens.sum())
    headers = find_headers(indices, table, "shared_prefix")
    prompts = np.bincount(headers.number, minlength=len(headers.tokens))
    saved = int((np.maximum(prompts - 1, 0) * headers.tokens).sum())
    return tokens, by_prompt, by_prompt - saved


def _headers(indices: np.ndarray, data: PreferenceData, tokenizer: PreTrainedTokenizerBase) -> dict:
    """least: tokens of a header.  of_prompts: looked at.  prompts: behind any header.  most: the most frequent ones."""
    headers = find_headers(indices, data.table, "shared_prefix")
    prompts = np.bincount(headers.number, minlength=len(headers.tokens))
    most = [int(i) for i in np.argsort(-prompts, kind="stable") if i]
    cut, shown = data.table.cut_prompt_ids(indices), []
    for number in most[:SHOWN]:
        [pair] = indices[np.flatnonzero(np.isin(cut, headers.prompts[headers.number == number]))[:1]]
        tokens = int(headers.tokens[number])
        text = tokenizer.decode(data.pairs([pair])[0][0][:tokens])
        shown.append({"prompts": int(prompts[number]), "tokens": tokens, "begins": " ".join(text.split()[:WORDS])})
    of_prompts = len(np.unique(cut))
    return {"least": LEAST_HEADER, "of_prompts": of_prompts, "prompts": int(prompts[1:].sum()), "most": shown}


def sentence(found: dict) -> str:
    """Of a source of the report, for the log; empty where no prompts begin alike."""
    headers = found["headers"]
    if not headers["most"]:
        return ""
    most = headers["most"][0]
    return (
        f"{headers['prompts']} of {headers['of_prompts']} prompts begin with a header that others have too (most often "
        f"{most['tokens']} tokens, {most['begins']!r}), which leaves {levels(found)}"
    )


def levels(found: dict) -> str:
    """The tokens of a step, level by level."""
    return (
        f"{found['tokens']} tokens in {found['pairs']} pairs, {found['by_prompt']} with prompts shared, "
        f"{found['by_header']} with headers shared too"
    )


def cells(found: dict) -> dict[str, str]:
    """Rows of the table of a source."""
    headers = found["headers"]
    lines = [f"{one['prompts']} prompts: {one['tokens']} tokens, {one['begins']}" for one in headers["most"]]
    return {
        "tokens of a step": levels(found).replace(", ", "\n"),
        "headers": "\n".join(lines) or f"none of {headers['least']} tokens or more",
    }
