"""Whether the three layouts give the same rewards on the device at hand, in its dtype, before anything is timed."""

from pathlib import Path

import numpy as np
import torch

from benchmarks import workloads
from open_rm.batching.layouts import lay_out
from open_rm.batching.rules import LAYOUTS
from open_rm.data.tokenizer import load_tokenizer
from open_rm.flags import ModelFlags
from open_rm.model.loading import load_reward_model

# Largest difference of a reward between layouts: two layers, rewards of about 1, sums in another order
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


class LayoutsDiffer(AssertionError):
    """Rewards of the same pairs are further apart than rounding explains."""


def check_layouts(
    loads: list[workloads.Workload], tokenizer, scratch: Path, dtype: torch.dtype | None = None
) -> dict[str, float]:
    """Prints the largest difference of each workload's rewards, and returns them by workload.

    dtype: None: bfloat16 on a GPU, float32 elsewhere.

    Raises:
        LayoutsDiffer: one is beyond TOLERANCE, or is no number.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    workloads.write_model(scratch / "tiny", workloads.SHAPES["tiny"], tokenizer)
    loaded = load_tokenizer(str(scratch / "tiny"))
    differences = {}
    for load in loads:
        file = workloads.write_rows(scratch, load)
        data = workloads.read_pairs(file, loaded, scratch / "cache", max_token_length=8192, amount="8")
        rewards = {layout: _rewards(layout, data, scratch / "tiny", loaded, device, dtype) for layout in LAYOUTS}
        worst = torch.stack([rewards[layout] - rewards["padded"] for layout in LAYOUTS]).abs().max().item()
        differences[load.name] = worst
        print(f"correctness on {device.type}, {load.name}: largest difference of rewards between layouts {worst:.1e}")
        if not worst <= TOLERANCE[dtype]:  # a NaN is not below anything
            raise LayoutsDiffer(
                f"{load.name}: rewards of the layouts are {worst:.1e} apart, more than {TOLERANCE[dtype]}"
            )
    return differences


def _rewards(layout: str, data, folder: Path, tokenizer, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    reward_model, _ = load_reward_model(
        ModelFlags(model_name_or_path=str(folder)), tokenizer, layout=layout, dtype=dtype
    )
    indices = np.arange(len(data))
    prompt_ids = data.table.cut_prompt_ids(indices)
    batch = lay_out(layout, data.pairs(indices), pad_token_id=tokenizer.pad_token_id, prompt_ids=prompt_ids)
    with torch.no_grad():
        return reward_model.to(device)(**batch.inputs(device)).float().cpu()
