"""What of a batch the model is called with, and what the loss and the metrics get."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from gradmaker.compare.batches.trees import length, moved
from gradmaker.compare.errors import InputError
from gradmaker.options.suggestions import did_you_mean


@dataclass(frozen=True)
class Call:
    """A call of the model, and the targets of its outputs."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    targets: Any
    size: int

    def outputs(self, model: nn.Module) -> Any:
        """The result of the call."""
        return model(*self.args, **self.kwargs)


class Reader:
    """Makes a `Call` of a batch, by the options `inputs` and `targets` of a task."""

    def __init__(self, inputs: Any, targets: Any, model: nn.Module, device: str) -> None:
        self.inputs, self.targets, self.device = inputs, targets, device
        named = inspect.signature(model.forward).parameters.values()
        self.names = [parameter.name for parameter in named if parameter.kind is not parameter.VAR_POSITIONAL]

    def __call__(self, batch: Any) -> Call:
        """The call of a batch. InputError for a batch that the options do not fit."""
        batch = moved(dict(batch) if isinstance(batch, Mapping) else batch, self.device)
        given = self._inputs(batch)
        args, kwargs = ((), given) if isinstance(given, Mapping) else (given, {})
        return Call(args, kwargs, self._targets(batch), length(batch))

    def _inputs(self, batch: Any) -> Any:
        if callable(self.inputs):
            given = self.inputs(batch)
            return given if isinstance(given, (tuple, Mapping)) else (given,)
        if self.inputs is not None:
            return self._named(batch, self.inputs)
        if isinstance(batch, Mapping):
            return self._by_forward(batch)
        if isinstance(batch, (tuple, list)):
            return tuple(batch[:-1]) if len(batch) > 1 else tuple(batch)
        return (batch,)

    def _named(self, batch: Any, names: Any) -> Any:
        if isinstance(names, str):
            return (_entry(batch, names, "inputs"),)
        return {name: _entry(batch, name, "inputs") for name in names}

    def _by_forward(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        if found := {name: batch[name] for name in self.names if name in batch}:
            return found
        raise InputError(
            f"batches have the entries {', '.join(map(str, batch))} and the model takes {', '.join(self.names) or 'none'}: "
            "say by Task(inputs=...) what it is called with"
        )

    def _targets(self, batch: Any) -> Any:
        if callable(self.targets):
            return self.targets(batch)
        if self.targets is not None:
            return _entry(batch, self.targets, "targets")
        return batch[-1] if isinstance(batch, (tuple, list)) else batch


def _entry(batch: Any, name: Any, option: str) -> Any:
    if isinstance(batch, Mapping) and name not in batch:
        raise InputError(f"{option}={name!r}: {did_you_mean(str(name), list(batch))}")
    if not isinstance(batch, Mapping) and isinstance(name, str):
        raise InputError(f"{option}={name!r}: a name is for batches that are dictionaries, these are {type(batch).__name__}s")
    return batch[name]
