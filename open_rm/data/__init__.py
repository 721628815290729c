"""Rows to token ids, once.

Where rows come from:
mixer         names in a mixer list to sources: files, split, amount
readers       files, folders and Hub data sets to rows with their places

What a row is:
lookup        where a value stands in a row: column, key, elements, several joined
forms         what makes a comparison; how a form of rows is described
public_sets   the table of public data sets, by their columns
labels        who won: labels, strengths, scores, ranks
attributes    scores of each answer that are predicted beside the preference
reading       the flags that say how the rows of a source are read
messages      lists of messages of every shape, checked
columns       which columns of a row are read as what, and what is left over
grouping      rows of one answer each, joined by their prompt

A row to pairs:
sides         two sides to one form: text, messages, token ids
comparisons   a row's values to unchecked pairs and ties
conversation  system text, history, prompt and answers to two sides
rows          one row of any form to pairs (prompt, chosen, rejected)
answers       one row of any form to the answers in it, each to be scored
counts        what happened to rows, counted; the log's lines

Pairs to token ids:
templates     chat templates by name
tokenizer     pad, end and reward token, chat template
encoding      pairs to text, text to token ids, cut to the limits
printed       whether a chat template prints all that a conversation holds
preparation   a block of rows to token ids: read, render, encode, judge; in one process or several
schema        the columns of the cache
prefixes      which sequences begin alike, and what sharing that saves
prefix_order  the same for all prompts of a data set, block by block
cache         a folder built once, by one process, found again, verified
building      all of a mixer list to a cache
pairs         what everybody reads: token ids, and columns of numbers
guide         docs/data.md from the table of sets
"""
