"""Checks that a maker makes by itself: whether what it measures on is what the model and the loss really do.

A file for each question: uses of parameters, examples, groups, the loss, the rest of the gradient. `checks` says when they run
and what follows, `findings` what is said of it.
"""

from gradmaker.self_checks.checks import SelfChecks
from gradmaker.self_checks.groups import Inputs

__all__ = ["Inputs", "SelfChecks"]
