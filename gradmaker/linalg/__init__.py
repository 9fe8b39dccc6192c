"""Linear algebra on stacks of matrices.

Factors in their three forms, eigenpairs, inverse roots, damping, mode products, retries of failed factorisations and their
diagnosis. Functions take a leading stack axis, and use no curvature, representation or solver. What one solver alone needs
stands beside that solver.
"""
