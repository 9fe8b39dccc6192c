"""Passes of a model: deferred calls, their evaluation on batches, autograd graphs for second derivatives, replays.

The modules here evaluate the calls that a user has declared: later than they were declared, on some of the examples, at other
weights with the same random numbers, or twice differentiable.
"""
