"""`verify`: every block on the user's own model and batch, against plain autograd and float64 matrices or products."""

from gradmaker.reports.verification.result import Check, Verification
from gradmaker.reports.verification.verify import verify

__all__ = ["Check", "Verification", "verify"]
