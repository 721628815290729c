"""Rewards to better weights.

losses      per-pair objectives
plan        numbers that follow from flags and data: steps, warm-up, when to evaluate
engine      DeepSpeed behind `backward` and `step`, with optimizer and schedule
ds_config   DeepSpeed's settings: a file for the memory layout, flags for the rest
metrics     sums over pairs, one reduce a step; what a step took
progress    how far the run is
tracking    the log, metrics.jsonl, samples.jsonl, TensorBoard, wandb
plots       curves.png
"""
