"""What can happen to a run from outside, and what it does about it.

watchdog    a rank that is dead, stopped or cut off ends the run in time, with one sentence and every rank's stacks
judging     which rank keeps the others from going on
lines       messages over a connection, and the last words of a rank
claim       an output folder is one run's; a dead run's is taken over
"""
