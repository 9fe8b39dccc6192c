"""Loops that are not ours: hooks on the model's call and on ``optimizer.step``, and which passes are part of a step.

What belongs here knows a foreign loop by its traces alone: calls, arriving gradients, and what became of ``.grad``.
"""
