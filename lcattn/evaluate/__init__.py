"""Evaluation of long-context readings: loss by position, needles in haystacks, associative recall.

A reading (`readings.py`) is a way for a model to read. `loss.py`, `needles.py` with `recall.py`, and `mqar.py` measure;
`report.py` keeps results as JSON; `commands.py` is the command `lcattn eval`.
"""
