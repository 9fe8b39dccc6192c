"""Passes of a model: deferred calls, their evaluation on batches, graphs for second derivatives, replays.

What belongs here evaluates what a user has declared: later than it was declared, on some of the examples, at other weights with
the same random numbers, or twice differentiable.
"""
