"""Arrays of scores in, numbers with their uncertainty out. numpy alone; nothing here knows where scores came from.

intervals    estimates with 95 % intervals: a share, means of rows, sums of shares; tests and their correction for many
paired       two models on the same rows: bootstrap, sign test (McNemar)
calibration  differences as probabilities: bins, ECE, Brier, loss, the temperature that fits
lengths      what length explains: by length, correlation, the rule of length alone, pairs of like length
ranking      Kendall's tau, the best of n
"""
