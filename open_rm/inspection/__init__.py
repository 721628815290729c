"""A look at the data before training: `python -m open_rm.inspection`, and the short form before every run.

report     numbers per source, overlap
findings   what is wrong, in sentences
look       short lines, tables, files
sharing    what a step computes, level by level, and headers
views      length histograms, pairs token by token
"""
