"""Rewards to better weights.

losses      per-pair objectives
list_losses  objectives of whole ranked lists
plan        numbers that follow from flags and data: steps, warm-up, when to evaluate
engine      DeepSpeed behind `backward` and `step`, with optimizer and schedule
engine_state  its weights and moments as flat tensors, whatever divides them
ds_config   DeepSpeed's settings: a file for the memory layout, flags for the rest
metrics     sums over pairs, one reduce a step; what a step took
progress    how far the run is
tracking    the log, and what is recorded of a run: into every sink, resumed where a checkpoint left it
sinks       metrics.jsonl, samples.jsonl, skipped.jsonl, TensorBoard; what cannot be written does not end the run
wandb_run   wandb, online or offline, which may fail
plots       curves.png
divergence  a step that is no number
best        the best evaluation, early stopping
footprint   bytes of weights, gradients and moments on each device
activations  bytes that a forward keeps of each position
fitting     how large a micro-batch is and what is recomputed, from the memory that is left
gathered    keys that a micro-batch gathers of headers and prompts, at most
filling     the worst micro-batches that the data can fill a budget with
trying      micro-batch budgets tried on the device
memory      out of memory, explained
stragglers  each rank's own seconds; which one is slow
"""
