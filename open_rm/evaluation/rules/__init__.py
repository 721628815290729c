"""The public benchmarks, each by its authors' own rules.

verdict         what rules give: lines of a table, each with what it is computed from
reward_bench    RewardBench 1: strict wins, four sections, weights
reward_bench_2  RewardBench 2: best of four, and Ties
rm_bench        RM-Bench: the matrix of styles, four domains
judge_bench     JudgeBench: both orders agree with the label
rmb             RMB: pairs, and best of n
known           the table of all of them: data, columns, rules
"""
