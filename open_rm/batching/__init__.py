"""Token ids to batches.

steps       which pairs form a step
rules       how pairs are computed: layout, limits, what attention costs
dealing     who computes which pairs of a step, cut into micro-batches
layouts     how a micro-batch lies in memory (padded, packed, shared prefix), and where each reward is read
attention   attention over packed rows: kernels by device, the slow reference
feeding     steps and micro-batches as the loop takes them, made ahead
prefetch    a background thread that makes items ahead of their use
"""
