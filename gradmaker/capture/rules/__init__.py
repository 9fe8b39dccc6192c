"""Layer rules: how the calls of each layer type become inputs and output gradients of a linear map.

Layer types are known here alone: a file for each family of layers, `generic` for layers without a rule, the registry in
`layers`. A rule writes a weight as a stack of matrices, and a call as inputs (G, n, r, i) and output gradients
(k, G, n, r, o).
"""

from gradmaker.capture.rules.layers import RULES

__all__ = ["RULES"]
