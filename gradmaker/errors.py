"""Errors and warnings of gradmaker that are no builtins."""

__all__ = ["SelfCheckError", "SelfCheckWarning"]


class SelfCheckWarning(UserWarning):
    """A layer is measured in a slower way, since the fast one would have been wrong; said once."""


class SelfCheckError(ValueError):
    """What a method would measure is not what the model or the loss does."""
