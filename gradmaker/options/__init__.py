"""Reading of options: checks of values, rules that name layers, YAML, earlier names, registries.

Also close matches for wrong names. The registries are filled by `register`. What an option means is not known here.
"""
