"""The packages that writing a report needs."""

from importlib.util import find_spec

NEEDED = {"jinja2": "jinja2", "vl_convert": "vl-convert-python", "itables": "itables"}


def require_extra() -> None:
    """ImportError that names the packages that are not installed."""
    if missing := [package for module, package in NEEDED.items() if find_spec(module) is None]:
        raise ImportError(f"a report needs {', '.join(missing)}: pip install 'gradmaker[compare]'")
