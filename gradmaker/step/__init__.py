"""The state of the step under way."""

from gradmaker.options.deprecations import moved_names

__getattr__ = moved_names(__name__)
