"""Secant back-propagation: a score's change from a reference, shared out exactly in one sweep.

tape.py writes down what ran, rules.py and reductions.py hold the rules (one place for all of them),
table.py says which operation has which, pair.py brings the case and its reference together.
"""
