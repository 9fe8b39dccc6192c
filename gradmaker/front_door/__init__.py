"""The front door: a `torch.optim.Optimizer` that holds a maker and the optimizer that takes the steps.

What belongs here is what a training loop sees of both together: the step, the saved state, the numbers for a logger, and what
is refused or warned of before training. Mathematics, and what a maker does alone, stand on the floors below.
"""
