"""A trained reward model opened, without DeepSpeed, and what is done with its rewards.

python -m open_rm.scoring score | best_of_n | pairs --model DIR --input FILE --output FILE.jsonl

"""
