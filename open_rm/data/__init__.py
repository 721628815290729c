"""Rows to token ids, once.

mixer         names in a mixer list to sources: files, split, amount
readers       files, folders and Hub data sets to rows with their places
rows          one row of any form to pairs (prompt, chosen, rejected)
messages      lists of messages, checked; from JSON text, from HH text
templates     chat templates by name
tokenizer     pad, end and reward token, chat template
encoding      pairs to text, text to token ids, cut to the limits
preparation   a block of rows to token ids: read, render, encode, judge; in one process or several
cache         a folder built once, by one process, found again, verified
building      all of a mixer list to a cache, and what happened to its rows counted
pairs         what everybody reads: token ids, and columns of numbers
"""
