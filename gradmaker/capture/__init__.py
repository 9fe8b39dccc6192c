"""What a forward and a backward pass show of layers.

The tape records calls and output gradients, rules bring the calls of each type of layer into one form, sites claim every
parameter once, shapes cut tensors into blocks. Models that cannot be recorded are refused here. Nothing here knows of evidence:
a curvature makes it from a site.
"""
