"""Layer rules: how the calls of each type of layer become inputs and output gradients.

How a layer computes is known here alone: a file for each family of layers, `generic` for all that have no rule, the registry
in `layers`. A rule writes a weight as a stack of matrices, and a call as inputs (G, n, r, i) and output gradients
(k, G, n, r, o).
"""
