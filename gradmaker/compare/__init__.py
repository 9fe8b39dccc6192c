"""Train several methods from the same start on the same data, and report what each one costs and reaches."""

from gradmaker.compare.comparison import compare
from gradmaker.compare.data import Data
from gradmaker.compare.errors import InputError
from gradmaker.compare.result import Comparison

__all__ = ["Comparison", "Data", "InputError", "compare"]
