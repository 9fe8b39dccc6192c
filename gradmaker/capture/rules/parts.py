"""Parameters that hold several linear maps side by side along their first axis: gates, projections, groups of a convolution.

With `gradmaker.capture.rules.layers` and `gradmaker.capture.rules.calls` one of the places that know layer types.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.conv import _ConvNd

from gradmaker.options.rules import Path

__all__ = ["natural_parts"]

GATES = {nn.LSTM: 4, nn.LSTMCell: 4, nn.GRU: 3, nn.GRUCell: 3}
OF_GATES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def natural_parts(path: Path, parameter: nn.Parameter) -> int:
    """Number of equal maps along a parameter's first axis; 1 where the modules that own it give none, or different numbers."""
    owned = [
        (module, name)
        for module in path.values()
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False)
        if p is parameter
    ]
    counts = {_parts(module, name) for module, name in owned}
    return counts.pop() if len(counts) == 1 else 1


def _parts(module: nn.Module, name: str) -> int:
    """Number of maps in a parameter that this module itself owns, by its name there."""
    for kind, gates in GATES.items():
        if isinstance(module, kind):
            return gates if name.startswith(OF_GATES) else 1
    if isinstance(module, nn.MultiheadAttention):
        return 3 if name.startswith("in_proj_") else 1
    return module.groups if isinstance(module, _ConvNd) and name == "weight" else 1
