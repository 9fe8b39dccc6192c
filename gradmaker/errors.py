"""Exception classes of gradmaker: an error and a warning of the self-checks, and of costs."""

__all__ = ["CostError", "CostlyMethodWarning", "SelfCheckError", "SelfCheckWarning"]


class SelfCheckWarning(UserWarning):
    """A layer is measured in a slower way, as the fast one would be wrong. Given once."""


class SelfCheckError(ValueError):
    """The measurement of a method would not agree with the model or the loss."""


class CostError(RuntimeError):
    """The cost of a step cannot be predicted."""


class CostlyMethodWarning(UserWarning):
    """A step with the default intervals of a method takes several times as long as one of Adam."""
