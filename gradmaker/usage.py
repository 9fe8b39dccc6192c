"""How a method is used: the defaults of `gradmaker.optimizer`."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Usage"]


@dataclass(frozen=True)
class Usage:
    """How a method is used where its paper and reference code use it."""

    momentum: float = 0.9
    """Momentum of SGD under ``P g``, where the method itself averages no gradients (``beta1`` is 0)."""
    hidden: bool = False
    """Whether it is for weights of hidden layers alone: embeddings, the last layer, norms and biases get Adam."""
    unit: bool = False
    """Whether the entries of ``P g`` have a size of about one, as those of Adam, so that one learning rate serves both."""
