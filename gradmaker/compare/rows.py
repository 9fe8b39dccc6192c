"""Rows of the comparison: a gradient maker (or none), a torch optimizer, and learning rates."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from gradmaker.compare.errors import InputError
from gradmaker.methods import from_config
from gradmaker.options.deprecations import current_name
from gradmaker.options.registry import METHODS
from gradmaker.options.suggestions import did_you_mean
from gradmaker.options.yaml_text import parse_yaml

Method = str | Path | Mapping[str, Any]
ROW_KEYS = ("label", "learning_rates", "optimizer")


class Default(NamedTuple):
    """Learning rates and momentum of SGD for a row that gives none."""

    learning_rates: tuple[float, ...]
    momentum: float


# Four learning rates a row, half a decade apart. Sources: Adam, Kingma & Ba 2015, section 2 (includes 1e-3); AdaGrad,
# torch.optim.Adagrad (includes 1e-2); M-FAC, the authors' code (includes 1e-3); the others, a coarse search on digits. SGD,
# and Shampoo, which by default has the length of SGD's step, have the usual momentum 0.9. Methods with their own average, or
# scaled by an inverse curvature, have none: with 0.9 K-FAC diverged on digits at a tenth of these rates. GGT divides by the
# root of a sum over its window, of whole gradients.
_NATURAL = Default((0.001, 0.003, 0.01, 0.03), 0.0)  # at 0.1 K-FAC diverged on MNIST
_ADAPTIVE = Default((3e-4, 1e-3, 3e-3, 1e-2), 0.0)
_MOMENTUM = Default((0.01, 0.03, 0.1, 0.3), 0.9)
_KEPT = Default((0.003, 0.01, 0.03, 0.1), 0.9)  # at 0.3 one MNIST training in three diverged
_SUMMING = Default((0.003, 0.01, 0.03, 0.1), 0.0)
_ROOTED = Default((0.1, 0.3, 1.0, 3.0), 0.0)
_DAMPED = Default((0.01, 0.03, 0.1, 0.3), 0.0)  # TNT: a damping of 0.1 on every factor makes short steps
_FITTED = Default((0.01, 0.03, 0.1, 0.3), 0.0)  # AdaHessian: 0.15, the authors' code; K-BFGS: 0.3, the paper
_WHOLE = Default((0.03, 0.1, 0.3, 1.0), 0.0)  # steps to the minimum of a quadratic model of the batch: 1 is the full step
_STATED = Default((0.1,), 0.0)  # equals the option `rate` of the method, which has its own momentum
DEFAULTS = {
    "gradient": _MOMENTUM,
    "SGD": _MOMENTUM,
    "shampoo": _KEPT,
    "adam": _ADAPTIVE,
    "adagrad": _SUMMING,
    "Adagrad": _SUMMING,
    "full_adagrad": _SUMMING,
    "one_sided": _KEPT,
    "caspr": _ADAPTIVE,
    "caspr_adaptive": _ADAPTIVE,
    "soap": _ADAPTIVE,
    "eshampoo": _ADAPTIVE,
    "kradagrad_star": _MOMENTUM,
    "kradagrad": _NATURAL,
    "kl_shampoo": _ADAPTIVE,
    "muon": _NATURAL,
    "mfac": _ADAPTIVE,
    "tnt": _DAMPED,
    "ggt": _ROOTED,
    **dict.fromkeys(("newton", "hessian_free", "ksd", "saddle_free", "lissa", "neumann", "curveball"), _WHOLE),
    "adahessian": _FITTED,
    "psgd": _FITTED,
    "psgd_kf": _FITTED,
    "psgd_whiten": _ADAPTIVE,
    "neumann_practical": _STATED,
    "lbfgs": _FITTED,
    "kbfgs": _FITTED,
    "kbfgs_l": _FITTED,
}
FALLBACK = {"maker": _NATURAL, "optimizer": _ADAPTIVE}  # any other maker, any other torch optimizer


@dataclass(frozen=True, kw_only=True)
class Row:
    """A configuration to train.

    Args:
        maker: the mapping for `from_config`; None trains with the optimizer alone.
        optimizer: name of a class in torch.optim; `options` are its arguments besides the learning rate.
    """

    label: str
    maker: Mapping[str, Any] | None
    optimizer: str
    options: Mapping[str, Any] = field(default_factory=dict)
    learning_rates: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.learning_rates:
            raise InputError(f"{self.label}: learning_rates=(): expected at least one learning rate")
        if bad := [rate for rate in self.learning_rates if not (math.isfinite(rate) and rate > 0)]:
            raise InputError(f"{self.label}: learning_rates={', '.join(map(str, bad))}: expected positive numbers")

    @property
    def method(self) -> str:
        """The name of the maker or, without one, of the optimizer."""
        return self.optimizer if self.maker is None else str(self.maker.get("method", "custom"))

    def build_maker(self, model: nn.Module) -> Any:
        """Make the gradient maker on this model; None for a row without one."""
        if self.maker is None:
            return None
        return from_config(model, dict(self.maker))

    def build_optimizer(self, model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
        """Make the torch optimizer."""
        return self.optimizer_class()(model.parameters(), lr=learning_rate, **self.options)

    def optimizer_class(self) -> Callable[..., torch.optim.Optimizer]:
        """The class of the torch optimizer."""
        return optimizers()[self.optimizer.lower()]

    def describe(self, maker: Any = None) -> dict[str, Any]:
        """The whole configuration as plain values, with the defaults of the maker's config."""
        config = getattr(maker, "config", None)
        resolved = {f.name: getattr(config, f.name) for f in fields(config)} if is_dataclass(config) else {}
        given = {current_name(type(config), name): value for name, value in (self.maker or {}).items()}
        stated = {} if self.maker is None else {"maker": plain({**given, **resolved})}
        return {**stated, "optimizer": {"name": self.optimizer, **plain(self.options)}}


def plain(value: Any) -> Any:
    """The value in types of JSON; classes and modules become names."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {type(value).__name__: {f.name: plain(getattr(value, f.name)) for f in fields(value)}}
    return getattr(value, "__qualname__", None) or str(value)


def optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    """torch.optim classes by lower-case name, without those that need a closure or sparse gradients."""
    kinds = (kind for kind in vars(torch.optim).values() if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer))
    return {kind.__name__.lower(): kind for kind in kinds if kind.__name__ not in ("Optimizer", "LBFGS", "SparseAdam")}


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
    """Yield mappings with a `method` or an `optimizer` from any form of entry."""
    if isinstance(method, Path) or (isinstance(method, str) and method.endswith((".yaml", ".yml"))):
        loaded = read_yaml(Path(method))
        for item in loaded if isinstance(loaded, list) else [loaded]:
            yield from _entries(item)
    elif isinstance(method, str):
        yield _named(method)
    elif not isinstance(method, Mapping):
        raise InputError(f"a method is a name, a mapping or a YAML path, got {method!r}")
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
    """The entry for the name of a method or, else, of a class in torch.optim. InputError for other names."""
    if name in METHODS:
        return {"method": name}
    if name.lower() in optimizers():
        return {"label": name.lower(), "optimizer": optimizers()[name.lower()].__name__}
    raise InputError(f"method={name!r}: {did_you_mean(name, sorted({*METHODS, *optimizers()}))}")


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
    return str(optimizer.get("name", "SGD")) if isinstance(optimizer, Mapping) else str(optimizer)


def _row(entry: dict[str, Any], label: str, rates: Sequence[float] | None, momentum: float | None) -> Row:
    maker = {key: value for key, value in entry.items() if key not in ROW_KEYS} if "method" in entry else None
    if maker is None and (unknown := sorted(set(entry) - set(ROW_KEYS))):
        raise InputError(f"{label}: {', '.join(unknown)} belongs inside 'optimizer: {{name: ..., ...}}', or name a 'method'")
    given = entry.get("optimizer")
    options = dict(given) if isinstance(given, Mapping) else {}
    options.pop("name", None)
    name = _known_optimizer(label, "SGD" if given is None else _optimizer_name(given))
    key = name if maker is None else str(maker["method"])
    default = DEFAULTS.get(key, FALLBACK["optimizer" if maker is None else "maker"])
    if name == "SGD" and not isinstance(given, Mapping):
        options["momentum"] = default.momentum if momentum is None or not default.momentum else momentum
    grid = _numbers(label, entry.get("learning_rates", rates if rates is not None else default.learning_rates))
    return Row(label=label, maker=maker, optimizer=name, options=options, learning_rates=grid)


def _known_optimizer(label: str, name: str) -> str:
    if name.lower() not in optimizers():
        raise InputError(f"{label}: torch.optim has no {name!r}: {did_you_mean(name, optimizers())}")
    return optimizers()[name.lower()].__name__


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
