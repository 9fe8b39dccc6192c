"""Exception classes of gradmaker: an error and a warning of the self-checks."""

__all__ = ["SelfCheckError", "SelfCheckWarning"]


class SelfCheckWarning(UserWarning):
    """A layer is measured in a slower way, as the fast one would be wrong. Given once."""


class SelfCheckError(ValueError):
    """The measurement of a method would not agree with the model or the loss."""
