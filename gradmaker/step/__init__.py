"""The state of the step under way."""
