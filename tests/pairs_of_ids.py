"""Pairs of token ids as the data room would have written them."""

import datasets
import numpy as np
import pyarrow as pa

from open_rm.data import preparation
from open_rm.data.encoding import PairIds
from open_rm.data.pairs import PreferenceData


def as_data(pairs, prompt_lengths) -> PreferenceData:
    """pairs: (chosen, rejected), prompt included.  prompt_lengths: tokens of each prompt, which chosen begins with."""
    ids = [PairIds(pair[0][:length], *pair) for pair, length in zip(pairs, prompt_lengths, strict=True)]
    kept = [(pair, preparation._content_id(np.array(pair.prompt, np.int32)), None, "") for pair in ids]
    columns = pa.Table.from_batches([preparation._record_batch(kept, 0)]).to_pydict()
    return PreferenceData(datasets.Dataset.from_dict(columns), ["pairs"], [], kind="token ids", facts=[])
