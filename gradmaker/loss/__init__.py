"""Losses: recorded calls, their terms as likelihoods, and the outputs that they are functions of."""
