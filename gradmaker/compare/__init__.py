"""The comparison: several methods trained from the same start on the same data, and what each one costs and reaches.

All of `gradmaker compare` and of `compare` is here, from the rows that a user names to the report: data sets, models, trials
that can be resumed, times and memory, figures. It needs the extra ``compare``.
"""

from gradmaker.compare.comparison import compare
from gradmaker.compare.data import Data
from gradmaker.compare.errors import InputError
from gradmaker.compare.result import Comparison

__all__ = ["Comparison", "Data", "InputError", "compare"]
