"""Fidelity: how near approximations of a curvature matrix are to it, on one's own model, loss and batches.

This folder implements `fidelity` and `fidelity_along`: the reference matrix, computed by autograd alone, what the blocks of
makers represent, the measures, dense or by random probes, and their table, figures and report. The measures need torch alone;
figures and the report need the extra ``compare``.
"""

from gradmaker.fidelity.along import FidelityAlong, fidelity_along
from gradmaker.fidelity.instrument import fidelity
from gradmaker.fidelity.result import Fidelity

__all__ = ["Fidelity", "FidelityAlong", "fidelity", "fidelity_along"]
