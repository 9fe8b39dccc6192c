"""`verify`: every block on the user's own model and batch, against plain autograd and float64 matrices or products.

A recorded pass of the declared batch, per-example gradients, scratch copies of blocks with a statistic of one piece of
evidence, and the table of errors. The references are formed in ways that the step does not use.
"""

from gradmaker.reports.verification.result import Check, Verification
from gradmaker.reports.verification.verify import verify

__all__ = ["Check", "Verification", "verify"]
