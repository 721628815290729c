"""How good is it.

held_out     held-out pairs, each scored once; a table of samples; rewards to find again after saving
calibration  how rewards are spread, and what their differences mean as probabilities
"""
