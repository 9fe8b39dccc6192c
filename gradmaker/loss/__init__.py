"""Losses: recorded calls, their terms as likelihoods, and the outputs that they are functions of.

The recorder sees torch's losses wherever they are called; a likelihood gives the Hessian of a term in the outputs, its factors
and samples of targets; what is not recognised is differentiated. Reductions, masks, class weights and smoothing are known here
and nowhere else.
"""
