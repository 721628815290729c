"""Pairs of token ids as the data room would have written them."""

import datasets
import numpy as np
import pyarrow as pa

from open_rm.data.encoding import PairIds
from open_rm.data.pairs import PreferenceData
from open_rm.data.schema import Kept, content_id, record_batch


def as_data(pairs, prompt_lengths) -> PreferenceData:
    """pairs: (chosen, rejected), prompt included.  prompt_lengths: tokens of each prompt, which chosen begins with."""
    ids = [PairIds(pair[0][:length], *pair) for pair, length in zip(pairs, prompt_lengths, strict=True)]
    prompts = [content_id(np.array(pair.prompt, np.int32)) for pair in ids]
    kept = [
        Kept(pair, prompt, None, "", 1.0, number, (0, 1))
        for number, (pair, prompt) in enumerate(zip(ids, prompts, strict=True))
    ]
    columns = pa.Table.from_batches([record_batch(kept, 0)]).to_pydict()
    return PreferenceData(datasets.Dataset.from_dict(columns), ["pairs"], [], kind="token ids", facts=[])
