"""What a run reads before there is a model: its config, the layout that follows, the tokenizer, the pairs.

The recipe and a dry run read it alike, so that what the one says is what the other does.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from open_rm.data.building import read_both
from open_rm.data.pairs import PreferenceData
from open_rm.data.tokenizer import fingerprint, tokenizer_of
from open_rm.flags import Args
from open_rm.model import attributes, families, sequence_parallel


@dataclass(frozen=True)
class Resolved:
    """config: the model's, of transformers.  dtype: that is computed in.  held_out_pairs: None where nothing is evaluated.
    notes: on flags that do nothing."""

    config: object
    dtype: torch.dtype
    layout: families.Layout
    tokenizer: PreTrainedTokenizerBase
    train_pairs: PreferenceData
    held_out_pairs: PreferenceData | None
    notes: tuple[str, ...]

    def marks(self, mark_of: Callable[[PreferenceData | None], str | None]) -> dict[str, str | None]:
        """What all ranks have to have read alike (alike.py). mark_of: the content of pairs in a hash."""
        config = hashlib.sha256(self.config.to_json_string(use_diff=False).encode()).hexdigest()
        marks = {"the model's config": config, "the tokenizer": fingerprint(self.tokenizer)}
        marks |= {"the training data": mark_of(self.train_pairs)}
        return marks | {"the held-out data": mark_of(self.held_out_pairs)}

    def lines(self) -> list[str]:
        """What was read as what, for the log."""
        held_out = self.held_out_pairs.lines if self.held_out_pairs else ["eval: no held-out data was named"]
        return [*self.notes, *self.train_pairs.lines, *held_out]


def resolve(
    args: Args,
    dtype: torch.dtype,
    *,
    on_gpu: bool,
    capability: tuple[int, int] | None,
    check: Callable[[object], None],
    show_progress: bool,
) -> Resolved:
    """Read it all, the cheapest first.

    Args:
        on_gpu, capability: the device to compute on; see families.choose_layout.
        check: is given the config before any data is read; it may refuse it.

    Raises:
        UserError: what was named cannot be read, or does not go together.
    """
    config = families.read_config(args, max_token_length=args.max_token_length)
    how = {"on_gpu": on_gpu, "bf16": dtype == torch.bfloat16, "capability": capability}
    how |= {"max_token_length": args.max_token_length}
    attributes.check(config, args.attribute_weights, args.model_name_or_path)
    layout = families.choose_layout(args.batching, config, attn_implementation=args.attn_implementation, **how)
    sequence_parallel.check(config, args.sequence_parallel_size, args, **how)
    tokenizer = tokenizer_of(args)
    families.check_together(args.model_name_or_path, config, tokenizer, args)
    check(config)
    pairs = read_both(args, tokenizer, seed=args.seed, show_progress=show_progress)
    slow = "--use_slow_tokenizer has no effect: transformers 5 has no slow tokenizers"
    return Resolved(config, dtype, layout, tokenizer, *pairs, (slow,) if args.use_slow_tokenizer else ())
