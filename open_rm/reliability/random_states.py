"""The states of random numbers, which dropout of adapters draws from, as tensors and back."""

import json
import random

import numpy as np
import torch

from open_rm.ranks import Ranks


def random_states(ranks: Ranks) -> dict[str, torch.Tensor]:
    """Of torch, numpy and Python, as bytes: dropout of adapters draws from torch's."""
    kind, keys, *position = np.random.get_state()
    rest = json.dumps([kind, position, random.getstate()]).encode()
    states = {"random/torch": torch.get_rng_state(), "random/numpy": torch.from_numpy(keys.astype(np.int64))}
    states["random/rest"] = torch.frombuffer(bytearray(rest), dtype=torch.uint8)
    if ranks.on_gpu:
        states["random/cuda"] = torch.cuda.get_rng_state(ranks.device)
    return states


def set_random_states(states: dict[str, torch.Tensor], ranks: Ranks) -> None:
    """Go on where `random_states` stood."""
    kind, position, own = json.loads(states["random/rest"].numpy().tobytes())
    np.random.set_state((kind, states["random/numpy"].numpy().astype(np.uint32), *position))
    random.setstate((own[0], tuple(own[1]), own[2]))
    torch.set_rng_state(states["random/torch"])
    if ranks.on_gpu and "random/cuda" in states:
        torch.cuda.set_rng_state(states["random/cuda"], ranks.device)
