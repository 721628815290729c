"""Batches to rewards.

families       what a config alone decides: can it be a reward model, which layouts are exact for it
loading        a checkpoint becomes a reward model: head, dropout off, what is trained
reward_model   backbone and score head: batch in, rewards out
adapters       LoRA and QLoRA: adapt, save, load, merge
kernels        fused kernels: Liger's on a GPU, ours on a CPU
cpu_kernels    rotary embeddings and norms in fewer passes over a CPU's memory
last_layer     the last layer computes only where a reward is read
"""
