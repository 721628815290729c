"""The last layer computes only what the score head reads.

Nothing looks at the last layer's output but the head, and the head looks at one token per sequence. Keys and values of
that layer are needed at every token; its queries, its attention's output projection and its MLP are needed at the read
tokens alone. So these modules get only those tokens (a hook picks them) and their output is put back into place, zero
elsewhere. Rewards and gradients are those of the full layer: what is left out is multiplied by nothing. With 6 layers an
eighth of all matrix products is saved, with 16 layers a twentieth; memory falls likewise.

Hooks on the modules leave their forward to whoever replaces it (Liger, DeepSpeed, peft). Not covered: fused query-key-value
projections (Phi-3, GPT-NeoX) compute all queries; the attention itself still runs over all of them.
Shapes: S sequences, T positions, R read positions, D width in, E width out.
"""

import torch
from torch import nn

# Names inside a decoder layer, over all families that families.SEGMENTS lists.
READ_ONLY = ("mlp", "self_attn.q_proj", "self_attn.o_proj", "attention.dense")


def compute_where_read(layer: nn.Module) -> list[nn.Parameter]:
    """Make a backbone's last layer compute at `read_index` only, a keyword that the backbone's forward is then given.

    read_index: [R] int64, the distinct positions among the flattened S * T that the head reads.  read_here: [R] which of
        them count where a rank has a stretch of a row and others read the rest (sequence_parallel.py); may be left out.

    Returns:
        the parameters that are applied at the R read positions from now on, instead of at all.
    """
    rows = _Rows()
    layer.register_forward_pre_hook(rows.remember, with_kwargs=True)
    modules = [module for name, module in layer.named_modules() if name in READ_ONLY]
    for module in modules:
        module.register_forward_pre_hook(rows.pick)
        module.register_forward_hook(rows.put_back)
    return [parameter for module in modules for parameter in module.parameters()]


class _Rows:
    """The positions of the last forward. Where gradients are checkpointed the layer is computed again in the backward pass,
    so that a forward's backward must come before the next forward, as it does in the recipe."""

    def remember(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.index, self.positions = kwargs["read_index"], hidden.shape[:2]
        self.here = kwargs.get("read_here")

    def pick(self, module: nn.Module, args: tuple) -> tuple[torch.Tensor]:
        """[S, T, D] to [1, R, D]"""
        return (args[0].flatten(0, 1)[self.index].unsqueeze(0),)

    def put_back(self, module: nn.Module, args: tuple, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
        """[1, R, E] to [S, T, E]; of several outputs the first (gpt-oss's MLP also gives its router's scores)."""
        if isinstance(output, tuple):
            return (self.put_back(module, args, output[0]), *output[1:])
        full, rows = output.new_zeros(self.positions.numel(), output.shape[-1]), output[0]
        if self.here is None:
            full = full.index_copy(0, self.index, rows)
        else:  # positions of other ranks stand at the stretch's ends, perhaps beside one of its own
            full = full.index_add(0, self.index, rows.masked_fill(~self.here[:, None], 0.0))
        return full.view(*self.positions, -1)
