"""How good is it, can it be believed, where does it fail.

python -m open_rm.evaluation --model DIR --benchmark reward_bench rm_bench --output_dir OUT     (rules/, trust/, page/)

held_out     held-out pairs while training, each scored once; a table of samples; rewards to find again after saving
calibration  what the saved folder says of its rewards: mean, deviation, temperature
arguments    the flags of the command
sets         what --benchmark and --dataset name, opened
scoring      a set's rows through a reward model, into scores.jsonl; agreement under swapping and batch size
keeping      scores.jsonl kept over kills, and told from those of other facts
console      the report in a few lines
in_training  the model that is trained: benchmarks at evaluations, the report at the end
engine_scorer  its engine in the place of an opened model, on all ranks
scored       scores as arrays, and the pairs in them
score_file   scores.jsonl, and scores that were made elsewhere, to ScoredSets
score_forms  how rows of scores are written, here and elsewhere
judgeable  whether scores can be judged at all
score_folders  which file of scores a named folder means
"""
