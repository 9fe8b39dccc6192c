"""``embeddings=False`` leaves tables to the fallback, in every method of the K-FAC family."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradmaker import METHODS, from_config

FAMILY = [name for name in METHODS if "embeddings" in getattr(METHODS[name].Config, "__dataclass_fields__", {})]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.hidden, self.head = nn.Embedding(7, 5), nn.Linear(5, 5), nn.Linear(5, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.hidden(self.table(tokens)).tanh())
        return out


@pytest.mark.parametrize("method", [name for name in FAMILY if name != "kfra"])
@pytest.mark.parametrize("tied", [False, True])
def test_tables_are_left_to_the_fallback(method: str, tied: bool) -> None:
    model = Tied() if tied else nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 3))
    table = next(model.parameters())
    for given in (True, False):
        maker = from_config(model, {"method": method, "embeddings": given, "fallback": "adam"})
        owner = next(b for b in maker.plan.blocks for s in b.sites if any(p is table for p in s.parameters.values()))
        adopted = given and not (tied and method in ("ekfac", "skfac"))  # these leave tied tables out anyway
        assert (owner.options.method == "method") is adopted


def test_the_family_has_the_option() -> None:
    assert set(FAMILY) >= {"kfac", "kflr", "ekfac", "skfac", "kfra"}
    with pytest.raises(ValueError, match="embeddings"):
        from_config(nn.Linear(3, 2), {"method": "kfac", "embeddings": 1})
