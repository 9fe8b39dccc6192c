"""The step under way.

What of a step has been done, which evidence waits for its end, and what of the step before it is kept for secants: an exception
at any moment leaves all of it as it was.
"""

from gradmaker.options.deprecations import moved_names

__getattr__ = moved_names(__name__)
