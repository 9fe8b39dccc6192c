"""Checks that a maker makes by itself: whether what it measures on is what the model and the loss really do."""

from gradmaker.self_checks.checks import SelfChecks
from gradmaker.self_checks.groups import Inputs

__all__ = ["Inputs", "SelfChecks"]
