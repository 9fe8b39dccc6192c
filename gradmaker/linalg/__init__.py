"""Linear algebra on stacks of matrices: factors, eigenpairs, roots, damping, fallbacks of failed factorisations."""
