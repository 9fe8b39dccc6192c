"""The step under way: its state, its clocks, and drafts of the blocks that it changes.

`StepState` is the one owner; no tensor of a block changes before the step ends without an exception.
"""

from gradmaker.options.deprecations import moved_names

__getattr__ = moved_names(__name__)
