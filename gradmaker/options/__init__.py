"""What is read from a user.

Checks of values, close matches for wrong names, rules that name layers, numbers in YAML, earlier names, and the registries that
`register` fills. Nothing here knows what an option means.
"""
