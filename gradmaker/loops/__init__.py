"""Training loops that do not call the maker: hooks on the model's call and on ``optimizer.step``, and the passes of a step.

Such a loop is known only by model calls, gradients that arrive, and later changes of ``.grad``.
"""
