"""What is read from a user: checks of values, close matches, name rules, numbers in YAML, registries of parts."""
