"""Self-checks of a maker: whether recorded calls and recognised loss terms are all that the model and the loss compute.

One file for each question: uses of parameters, examples, groups, the loss, the rest of the gradient. `checks` says when they
run and what follows, `findings` holds and reports what they find.
"""

from gradmaker.self_checks.checks import SelfChecks
from gradmaker.self_checks.groups import Inputs

__all__ = ["Inputs", "SelfChecks"]
