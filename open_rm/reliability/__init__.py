"""What can happen to a run from outside, and what it does about it.

survival     what lasts as long as a run: the next three
watchdog     a rank that is dead, stopped or cut off ends the run in time, with one sentence and every rank's stacks
signals      a run that is asked to stop agrees on a step, saves and leaves
claim        an output folder is one run's; a dead run's is taken over
judging      which rank keeps the others from going on
pulse        when a rank last moved on, in seconds in which it ran
lines        messages over a connection, and the last words of a rank
keeper       checkpoints: when, written behind the training, committed, kept
shards       an engine's state in files of ranks, and back on any number of them
random_states  of torch, numpy and Python, as tensors
checkpoints  on the disk: found, verified, chosen
comparing    what may differ between a run and the command that goes on with it
resuming     from the same command to the checkpoint that it goes on from
"""
