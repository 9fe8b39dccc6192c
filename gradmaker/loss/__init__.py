"""Losses: recorded calls, their terms as likelihoods, and the outputs that a loss is a function of.

The recorder sees every call of torch's losses. A likelihood gives the Hessian of a loss term in the outputs, factors of it, and
sampled targets. The Hessian of other losses is formed by autograd. Reductions, masks, class weights and label smoothing are
known here and nowhere else.
"""
