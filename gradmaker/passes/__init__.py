"""Passes of a model: deferred calls, their evaluation on batches, graphs for second derivatives, replays."""
