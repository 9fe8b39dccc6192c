"""Recording of the layers of a model in a forward and a backward pass.

The tape records calls and output gradients. Layer rules bring the calls of each layer type into one form. Sites assign every
parameter to one block. Shape policies cut tensors into blocks. Models that cannot be recorded are refused here. Evidence is not
known here: a curvature builds it from a site.
"""
