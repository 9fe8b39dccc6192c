"""`verify`: every block on the user's own model and batch, against plain autograd and float64 matrices or products.

A recorded pass of the declared batch, gradients of single examples, scratch copies of blocks with a statistic of one piece of
evidence, and the table of errors. What a block should be is formed here in ways that the step does not use.
"""

from gradmaker.reports.verification.result import Check, Verification
from gradmaker.reports.verification.verify import verify

__all__ = ["Check", "Verification", "verify"]
