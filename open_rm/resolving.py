"""What a run reads before there is a model: its config, the layout that follows, the tokenizer, the pairs.

The recipe and a dry run read it alike, so that what the one says is what the other does.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from open_rm.data.building import read_both
from open_rm.data.pairs import PreferenceData
from open_rm.data.tokenizer import tokenizer_of
from open_rm.flags import Args
from open_rm.model import families


@dataclass(frozen=True)
class Resolved:
    """config: the model's, of transformers.  dtype: that is computed in.  held_out_pairs: None where nothing is evaluated."""

    config: object
    dtype: torch.dtype
    layout: families.Layout
    tokenizer: PreTrainedTokenizerBase
    train_pairs: PreferenceData
    held_out_pairs: PreferenceData | None

    def lines(self) -> list[str]:
        """What was read as what, for the log."""
        held_out = self.held_out_pairs.lines if self.held_out_pairs else ["eval: no held-out data was named"]
        return [*self.train_pairs.lines, *held_out]


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
    how = {"attn_implementation": args.attn_implementation, "max_token_length": args.max_token_length}
    how |= {"on_gpu": on_gpu, "bf16": dtype == torch.bfloat16, "capability": capability}
    layout = families.choose_layout(args.batching, config, **how)
    tokenizer = tokenizer_of(args)
    families.check_together(args.model_name_or_path, config, tokenizer, args)
    check(config)
    pairs = read_both(args, tokenizer, seed=args.seed, show_progress=show_progress)
    return Resolved(config, dtype, layout, tokenizer, *pairs)
