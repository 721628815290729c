"""open_rm: train reward models from human preferences. Start with `open_rm/reward_modeling.py`.

On top stands what everybody uses (flags, checks, errors, ranks, manifest, command_line) and what is started with
`python -m` (reward_modeling, inspection, hub, toy). What stands in a folder is imported, from the ground up:

    data         rows to token ids, once
    batching     token ids to batches
    model        batches to rewards
    training     rewards to better weights
    evaluation   how good is it
    publishing   save, prove, describe, push
    inspection   a look at the data before
"""

__version__ = "0.1.0"
