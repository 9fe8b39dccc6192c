"""Costs of a step by method, as a function of batch size, width and interval: measured, and predicted beside that.

`study.py` says what is measured and runs it, `subjects.py` has models with batches, `steps.py` the kinds of steps of a row,
`cell.py` measures one row at one size, `predicted.py` has the cost model; `tables.py` and `figures.py` write what was found. It
needs the extra ``compare``.
"""
