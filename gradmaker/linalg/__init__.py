"""Linear algebra on stacks of matrices.

Factors in their three forms, eigenpairs, roots, damping, products along axes, retries of failed factorisations and what they
report. Functions are written for a leading stack axis and know no curvature, representation or solver. What serves one solver
alone stands beside that.
"""
