"""Batches to rewards.

families       what a config alone decides: can it be a reward model, which layouts are exact for it
any_decoder    decoders that transformers has no classifier of: one is made, and saved with them
modeling_reward  what it is made of, and the file that such a folder brings
loading        a checkpoint becomes a reward model: head, dropout off, what is trained
reward_model   backbone and score head: batch in, rewards out
contract       what a client has to know besides the weights: contract.json
adapters       LoRA and QLoRA: adapt, save, load, merge
attributes     regression heads beside the preference head, saved as one row
kernels        what is fast on a device: fused kernels (Liger's on a GPU, ours on a CPU), attention, float8
cpu_kernels    rotary embeddings and norms in fewer passes over a CPU's memory
flash          which flash attention computes packed rows on a GPU
float8         the large matrix products of training in 8 bits
recompute      which layers' activations are computed again in the backward pass; what a forward keeps
last_layer     the last layer computes only where a reward is read
sequence_parallel  several devices compute one row together, each a stretch of it
"""
