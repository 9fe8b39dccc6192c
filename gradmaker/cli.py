"""Entry point of the command `gradmaker`."""

import sys

from gradmaker.compare.errors import InputError, require_extra


def main() -> None:
    """Run the command. Without the extra `compare`, print how to install it and exit with status 2."""
    try:
        require_extra()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    from gradmaker.commands.app import app

    app(prog_name="gradmaker")
