"""How far a score can be believed, from scores alone: plain dictionaries and lists, which report.json holds as they are.

report       the whole report of one model, or of two on the same rows
sections     calibration, lengths, margins, sources, styles, rankings of one set
examples     the most confident mistakes and the least sure pairs, as texts
words        the three answers in plain words, and the warnings
against      two models on the same pairs
"""
