"""The comparison of methods: each is trained from the same parameters on the same data, and its cost and accuracy are reported.

This folder implements `compare` and the command `gradmaker compare`: rows, data sets, models, trials that can be resumed, times
and memory, figures and report. It needs the extra ``compare``.
"""

from gradmaker.compare.comparison import compare
from gradmaker.compare.data import Data
from gradmaker.compare.errors import InputError
from gradmaker.compare.result import Comparison

__all__ = ["Comparison", "Data", "InputError", "compare"]
