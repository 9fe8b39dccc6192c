"""Layer rules: how the calls of each type of layer become inputs and output gradients."""
