"""Options of a subcommand from a YAML file, and to one that runs it again."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from gradmaker.compare.errors import InputError
from gradmaker.compare.parsing import read_yaml
from gradmaker.options.suggestions import did_you_mean
from gradmaker.version import __version__

__all__ = ["HELP_ASKED", "as_yaml", "check_folder", "given_as_data", "read_config", "settings", "write_config"]

CONFIG = "config.yaml"
NOT_KEPT = ("config", "print_config", "quiet", "list_methods", "version")
"""Options that say how a run is started, not what it does."""
DATA = ("method", "methods", "tuning", "vary", "approximations", "tasks")
"""Options that a file may give as lists and mappings, which a command line cannot."""
KEY, HELP_ASKED = "gradmaker", "gradmaker help"


def read_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """The options of a file become defaults of the command line. InputError for options that the subcommand lacks."""
    if path is None or ctx.meta.get(HELP_ASKED):
        return path
    content = read_yaml(path)
    if isinstance(content, list):
        content = {"methods": content}
    if not isinstance(content, Mapping):
        raise InputError(f"{str(path)!r}: expected options by name, or a list of methods")
    given = {str(name).replace("-", "_"): value for name, value in content.items() if name != KEY}
    known = _names(ctx)
    for name in given:
        if name not in known:
            raise InputError(f"{str(path)!r}: {name!r}: {did_you_mean(name, sorted(known))}")
    ctx.meta[KEY] = {name: value for name, value in given.items() if name in DATA}
    ctx.default_map = {known[name]: value for name, value in given.items() if name not in DATA and value is not None}
    return path


def _names(ctx: typer.Context) -> dict[str, str]:
    """The parameters of the subcommand by the names of their options."""
    named = {}
    for parameter in ctx.command.params:
        if parameter.name is not None and parameter.name not in NOT_KEPT:
            long = max(parameter.opts, key=len).lstrip("-").replace("-", "_")
            named[long if parameter.param_type_name == "option" else parameter.name] = parameter.name
    named.pop("help", None)
    return named


def given_as_data(ctx: typer.Context, name: str, value: Any) -> Any:
    """A list or mapping: that of the command line, else that of the file, else None."""
    return value or ctx.meta.get(KEY, {}).get(name)


def settings(ctx: typer.Context, **resolved: Any) -> dict[str, Any]:
    """All options by name, those that were resolved by their values; options without a value are left out."""
    by_parameter = {parameter: option for option, parameter in _names(ctx).items()}
    known = {by_parameter[name]: value for name, value in ctx.params.items() if name in by_parameter}
    found = {**known, **ctx.meta.get(KEY, {}), **resolved}
    kept = {name: _plain(value) for name, value in found.items() if value not in (None, [], ())}
    return {KEY: __version__, **kept}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def as_yaml(options: Mapping[str, Any]) -> str:
    """The options as a YAML file."""
    import yaml

    return str(yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True, width=120))


def check_folder(out: Path) -> None:
    """InputError where an output folder could not be made, before anything is computed for it."""
    there = next(each for each in (out.resolve(), *out.resolve().parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"cannot write to the output folder {str(out)!r}: {str(there)!r} is no folder that may be written to")


def write_config(options: Mapping[str, Any], out: Path) -> None:
    """Write the options beside a report, without the folder itself. InputError where it cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        kept = {name: value for name, value in options.items() if name != "out"}
        (out / CONFIG).write_text(as_yaml(kept), encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write to the output folder {str(out)!r}: {error.strerror}") from error
