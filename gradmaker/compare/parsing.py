"""Rows from what a user writes: names, mappings, classes, and YAML files."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from gradmaker.compare.errors import InputError
from gradmaker.compare.rates import DEFAULTS, FALLBACK
from gradmaker.compare.rows import Row, optimizers, plain
from gradmaker.options.registry import METHODS
from gradmaker.options.suggestions import did_you_mean
from gradmaker.options.yaml_text import parse_yaml

Method = str | Path | Mapping[str, Any] | type | Any
ROW_KEYS = ("label", "learning_rates", "optimizer", "space")
DEFAULT_METHODS = ("sgd", "torch.Adam", "kfac", "shampoo")


def parse_rows(
    methods: Iterable[Method] | Mapping[str, Any],
    learning_rates: Sequence[float] | None = None,
    momentum: float | None = None,
) -> tuple[Row, ...]:
    """Rows from names, mappings, labelled mappings and YAML paths. InputError for entries that cannot be used.

    Args:
        learning_rates: the grid for rows without one; None: `DEFAULTS`.
        momentum: momentum of SGD in rows without an optimizer that have one in `DEFAULTS`; None: as given there.
    """
    if isinstance(methods, (str, Path)):
        methods = [methods]
    entries = [entry for method in _listed(methods) for entry in _entries(method)]
    if not entries:
        raise InputError("give at least one method to compare")
    labels = _labels(entries)
    return tuple(_row(entry, label, learning_rates, momentum) for entry, label in zip(entries, labels, strict=True))


def _listed(methods: Iterable[Method] | Mapping[str, Any]) -> Iterable[Any]:
    return [methods] if isinstance(methods, Mapping) else methods


def _entries(method: Any) -> Iterator[dict[str, Any]]:
    """Yield mappings with a `method` or an `optimizer` from any form of entry. InputError for what is none."""
    if isinstance(method, Path) or (isinstance(method, str) and method.endswith((".yaml", ".yml"))):
        loaded = read_yaml(Path(method))
        for item in loaded if isinstance(loaded, list) else [loaded]:
            yield from _entries(item)
    elif isinstance(method, str):
        yield _named(method)
    elif not isinstance(method, Mapping):
        yield _of_class(method)
    elif "method" in method or "optimizer" in method:
        yield dict(method)
    else:
        yield from _labelled(method)


def _labelled(method: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for label, entry in method.items():
        inner = _named(entry) if isinstance(entry, str) else entry
        if not isinstance(inner, Mapping) or not ("method" in inner or "optimizer" in inner):
            raise InputError(f"{label!r} names no method: write 'method: kfac', or '{label}: {{method: kfac}}'")
        yield {"label": str(label), **inner}


def _named(name: str) -> dict[str, Any]:
    """The entry for the name of a method or, else, of an optimizer. InputError for other names.

    `adam` is the maker of this library, `torch.Adam` the optimizer of torch, `package.module.Class` one of any package.
    """
    if name in METHODS:
        return {"method": name}
    if name.lower() in optimizers():
        return {"label": name.lower(), "optimizer": optimizers()[name.lower()].__name__}
    if "." in name:
        return {"label": name, "optimizer": _optimizer_class(name, name)}
    raise InputError(f"method={name!r}: {did_you_mean(name, sorted({*METHODS, *optimizers()}))}")


def _of_class(given: Any) -> dict[str, Any]:
    """The entry for a class of an optimizer or maker, or for the config of a method. InputError for anything else."""
    if isinstance(given, type) and issubclass(given, torch.optim.Optimizer):
        return {"label": given.__name__, "optimizer": given}
    for name, maker in METHODS.items():
        kind: Any = maker
        if given is kind:
            return {"method": name}
        if type(given) is kind.Config and is_dataclass(given):
            return {"method": name, **{f.name: getattr(given, f.name) for f in fields(given) if f.init}}
    raise InputError(f"a method is a name, a mapping, a YAML path, or the class of an optimizer or maker, got {given!r}")


def _optimizer_class(label: str, given: Any) -> type[torch.optim.Optimizer]:
    """The class of an optimizer by its name in torch.optim, its path, or as it is. InputError for any other."""
    if isinstance(given, type) and issubclass(given, torch.optim.Optimizer):
        return given
    name = str(given)
    short = name.removeprefix("torch.").removeprefix("optim.").lower()
    if short in optimizers():
        return optimizers()[short]
    module, _, kind = name.replace(":", ".").rpartition(".")
    try:
        found = getattr(import_module(module), kind) if module and not name.startswith("torch.") else None
    except (ImportError, AttributeError) as error:
        raise InputError(f"{label}: optimizer {name!r} cannot be imported: {error}") from error
    if isinstance(found, type) and issubclass(found, torch.optim.Optimizer):
        return found
    raise InputError(f"{label}: torch.optim has no {name!r}: {did_you_mean(short, optimizers())}")


def _labels(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The given labels; else the method's name, with options where two rows would have the same. InputError for duplicates."""
    names = [str(e.get("label") or e.get("method") or _optimizer_name(e["optimizer"]).lower()) for e in entries]
    shared = Counter(names)
    labels = [
        f"{name} ({_options(e)})" if shared[name] > 1 and _options(e) else name for name, e in zip(names, entries, strict=True)
    ]
    if twice := [label for label, count in Counter(labels).items() if count > 1]:
        raise InputError(f"two rows are called {twice[0]!r}: give each its own 'label'")
    return labels


def _options(entry: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={plain(value)}" for key, value in entry.items() if key not in ("label", "method"))


def _optimizer_name(optimizer: Any) -> str:
    name = optimizer.get("name", "SGD") if isinstance(optimizer, Mapping) else optimizer
    return name.__name__ if isinstance(name, type) else str(name)


def _row(entry: dict[str, Any], label: str, rates: Sequence[float] | None, momentum: float | None) -> Row:
    maker = {key: value for key, value in entry.items() if key not in ROW_KEYS} if "method" in entry else None
    if maker is None and (unknown := sorted(set(entry) - set(ROW_KEYS))):
        raise InputError(f"{label}: {', '.join(unknown)} belongs inside 'optimizer: {{name: ..., ...}}', or name a 'method'")
    given = entry.get("optimizer", "SGD")
    options = dict(given) if isinstance(given, Mapping) else {}
    kind = _optimizer_class(label, options.pop("name", "SGD") if isinstance(given, Mapping) else given)
    name = kind.__name__
    key = name if maker is None else str(maker["method"])
    default = DEFAULTS.get(key, FALLBACK["optimizer" if maker is None else "maker"])
    if name == "SGD" and not isinstance(given, Mapping):
        options["momentum"] = default.momentum if momentum is None or not default.momentum else momentum
    grid = _numbers(label, entry.get("learning_rates", rates if rates is not None else default.learning_rates))
    space = entry.get("space", {})
    if not isinstance(space, Mapping):
        raise InputError(f"{label}: space={space!r}: expected a mapping of options to values or ranges")
    own = None if optimizers().get(name.lower()) is kind else kind
    return Row(label=label, maker=maker, optimizer=name, options=options, learning_rates=grid, kind=own, space=space)


def _numbers(label: str, values: Any) -> tuple[float, ...]:
    try:
        return tuple(dict.fromkeys(float(value) for value in (values if isinstance(values, (list, tuple)) else [values])))
    except (TypeError, ValueError):
        raise InputError(f"{label}: learning_rates={values!r}: expected numbers") from None


def read_yaml(path: Path) -> Any:
    """The parsed YAML file. InputError where it cannot be read or parsed."""
    import yaml

    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from error
