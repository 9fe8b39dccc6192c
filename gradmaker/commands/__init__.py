"""The command `gradmaker`: one file a subcommand, and what they share.

`app.py` collects the subcommands and turns errors into one sentence and an exit status; `options.py` has the options that they
share, `settings.py` reads and writes their YAML files.
"""
