"""The comparison of methods: each is trained from the same parameters on the same data, and its cost and accuracy are reported.

This folder implements `compare` and the command `gradmaker compare`: rows, data sets, models, trials that can be resumed, times
and memory, figures and report. It needs the extra ``compare``.
"""

from gradmaker.compare.comparison import compare, write
from gradmaker.compare.errors import InputError
from gradmaker.compare.result import Comparison
from gradmaker.compare.search.budgets import Budget
from gradmaker.compare.search.tuning import Tuning
from gradmaker.compare.task import Metric, Task, load_task

__all__ = ["Budget", "Comparison", "InputError", "Metric", "Task", "Tuning", "compare", "load_task", "write"]
