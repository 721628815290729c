"""Token ids to batches.

steps       which pairs form a step
rules       how pairs are computed: layout, limits, what attention costs
work        pairs that stay together, their tokens and their attention, in numbers alone
headers     what many prompts of a step have in common at their start
assigning   which rank takes which units, by cost and by header
cutting     a rank's share to micro-batches
dealing     who computes which pairs of a step, cut into micro-batches
layouts     how a micro-batch lies in memory (padded, packed, shared prefix), and where each reward is read
attention   attention over packed rows: kernels by device, the slow reference
merged_attention  on a CPU: calls of one kernel for the same queries, merged by log-sum-exp
targets     what the loss is told of each pair: margins, how sure its label is, the lists of a micro-batch
feeding     steps and micro-batches as the loop takes them, made ahead
prefetch    a background thread that makes items ahead of their use
"""
