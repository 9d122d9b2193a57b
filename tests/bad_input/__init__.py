"""Malformed inputs, drawn by hypothesis: every one ends in a clear line or in a right result.

python -m tests.bad_input --cases 20000 --seed 1
"""
