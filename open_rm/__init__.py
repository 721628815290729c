"""open_rm: train reward models from human preferences. Start with `open_rm/reward_modeling.py`."""

__version__ = "0.1.0"
