"""YAML parser in which ``1e-3`` is a number: PyYAML follows YAML 1.1, which requires ``1.0e-3`` and reads others as text."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["parse_yaml"]

NUMBER = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. ImportError without PyYAML, its YAMLError for invalid text."""
    try:
        import yaml
    except ImportError:
        raise ImportError("reading a YAML file needs PyYAML: pip install 'gradmaker[compare]'") from None

    class Loader(yaml.SafeLoader):
        """SafeLoader whose resolvers are its own."""

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))
    return yaml.load(text, Loader)
