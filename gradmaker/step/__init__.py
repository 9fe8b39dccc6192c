"""The step under way: what it knows of itself, what its passes have brought, and the copies in which blocks are changed.

`StepState` is the one owner; nothing that a block holds changes before the step ends without an exception.
"""

from gradmaker.options.deprecations import moved_names

__getattr__ = moved_names(__name__)
