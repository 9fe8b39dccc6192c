"""The models of the command: a multilayer perceptron and a convolutional network."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

from torch import nn

from gradmaker.compare.data import Data
from gradmaker.compare.errors import InputError
from gradmaker.options.suggestions import did_you_mean


def mlp(data: Data, hidden: Sequence[int]) -> nn.Module:
    """Multilayer perceptron: linear layers with ReLU between them."""
    widths = [data.train_inputs[0].numel(), *hidden]
    layers = [layer for sizes in pairwise(widths) for layer in (nn.Linear(*sizes), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(widths[-1], _outputs(data)))


def conv(data: Data, hidden: Sequence[int]) -> nn.Module:
    """3x3 convolutions with `hidden` channels, each with ReLU and 2x2 pooling, then a linear layer.

    InputError where the images are too small for the poolings.
    """
    channels, height, width = data.train_inputs.shape[1:]
    if min(height, width) >> len(hidden) < 1:
        raise InputError(f"hidden={list(hidden)!r}: too many pooling layers for {height}x{width} images: give fewer")
    layers: list[nn.Module] = []
    for size in pairwise([channels, *hidden]):
        layers += [nn.Conv2d(*size, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    features = ([channels, *hidden][-1]) * (height >> len(hidden)) * (width >> len(hidden))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, _outputs(data)))


MODELS: dict[str, Callable[[Data, Sequence[int]], nn.Module]] = {"mlp": mlp, "conv": conv}


def factory(name: str, data: Data, hidden: Sequence[int]) -> Callable[[], nn.Module]:
    """A function without arguments that makes the named model for the data. InputError for unknown names or widths below 1."""
    if name not in MODELS:
        raise InputError(f"model={name!r}: {did_you_mean(name, MODELS)}")
    if any(size < 1 for size in hidden):
        raise InputError(f"hidden={list(hidden)!r}: expected widths of at least 1")
    return partial(MODELS[name], data, tuple(hidden))


def _outputs(data: Data) -> int:
    return int(data.train_targets.max()) + 1
