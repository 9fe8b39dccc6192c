"""What groups rows by example groups them as the inputs do, whatever the layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradmaker import CustomGradientConfig, CustomGradientMaker, from_config
from gradmaker.curvature import Curvature, FisherEmp, FisherExact, GaussNewton
from gradmaker.representations import Eigenbasis, Kron, KronRows, Representation
from gradmaker.self_checks import checks
from gradmaker.solvers import Cholesky, Rotate
from tests import oracles
from tests.measure import custom
from tests.pointwise import (
    BODY,
    FULL,
    ORDERS,
    C,
    D,
    N,
    Rows,
    attached,
    build,
    by_examples,
    declare,
    features,
    flat,
    held,
    loss_of,
)


@pytest.mark.parametrize("T", [2, N, 6, 2 * N])
@pytest.mark.parametrize("name", ORDERS)
def test_gradients_of_examples_are_those_of_the_inputs(name: str, T: int) -> None:
    """Where positions and examples are as many, too."""
    model, x, t, turned = build(name, T)
    maker = custom(model, FisherEmp(), FULL)
    declare(maker, model, x, t, loss_of(turned))
    state = torch.get_rng_state()
    maker.forward_and_backward()
    assert torch.equal(state, torch.get_rng_state())
    expected = by_examples(maker, model, x, t, loss_of(turned), 1 / N, N * T)
    assert oracles.relative_error(held(maker)[0][0], expected) < 1e-12
    assert not maker.checks.arrangement.notes
    maker.forward_and_backward()  # as it is remembered
    assert oracles.relative_error(held(maker)[0][0], expected) < 1e-12


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("T", [2, 2 * N])
def test_of_tokens_too(name: str, T: int) -> None:
    model, x, t, turned = build(name, T, tokens=True)
    model.rows = TOKENS.get(name, model.rows)
    maker = custom(model, FisherEmp(), FULL)
    declare(maker, model, x, t, loss_of(turned))
    maker.forward_and_backward()
    expected = by_examples(maker, model, x, t, loss_of(turned), 1 / N, N * T)
    assert oracles.relative_error(held(maker)[0][0], expected) < 1e-12


TOKENS: dict[str, Rows] = {
    "example first": ORDERS["example first"][0],
    "example first, layers flat": lambda m, x: BODY(m, x.reshape(-1)),
    "time first": ORDERS["time first"][0],
    "time first, layers flat": lambda m, x: BODY(m, x.T.reshape(-1)),
    "time first in the loss alone": ORDERS["time first in the loss alone"][0],
    "layers flat time first, loss example first": lambda m, x: flat(
        BODY(m, x.T.reshape(-1)).unflatten(0, (x.shape[1], -1)).transpose(0, 1)
    ),
}


GROUPING: dict[str, tuple[Curvature, Representation]] = {
    "reduce, exact": (FisherExact(), Kron(sharing="reduce")),
    "reduce, empirical": (FisherEmp(), Kron(sharing="reduce")),
    "eigenbasis": (FisherExact(), Eigenbasis(sharing="reduce")),
}


LAID_OUT = [
    (name, ignored)
    for name in list(ORDERS)[1:]
    for ignored in (False, True)
    if not (ignored and name == "views one by one")  # terms of different calls mask none of their positions
]


def maker_of(model: nn.Module, curvature: Curvature, representation: Representation) -> CustomGradientMaker:
    solver = Rotate(damping=1.0) if isinstance(representation, Eigenbasis) else Cholesky(damping=1.0)
    config = CustomGradientConfig(curvature=curvature, representation=representation, solver=solver, decay=0.0)
    return CustomGradientMaker(model, config)


@pytest.mark.parametrize("T", [2, 2 * N])
@pytest.mark.parametrize(("name", "ignored"), LAID_OUT)
@pytest.mark.parametrize("what", GROUPING)
def test_statistics_that_group_rows_do_not_depend_on_the_layout(what: str, ignored: bool, name: str, T: int) -> None:
    found = []
    for layout in ("example first", name):
        model, x, t, turned = build(layout, T)
        t = t.masked_fill(torch.arange(N * T).reshape(N, T) % 5 < 2, -100) if ignored else t
        maker = maker_of(model, *GROUPING[what])
        declare(maker, model, x, t, loss_of(turned))
        maker.forward_and_backward()
        found.append(held(maker))
    assert all(oracles.relative_error(a, b) < 1e-12 for a, b in zip(*reversed(found), strict=True))


@pytest.mark.parametrize("reduction", ["sum", "subsample"])
def test_rows_of_factors_are_those_of_examples(reduction: Any) -> None:
    found = []
    for layout in ("example first", "time first, layers flat"):
        model, x, t, turned = build(layout, 2 * N)
        maker = custom(model, FisherEmp(), KronRows(reduction=reduction, positions=2))
        declare(maker, model, x, t, loss_of(turned))
        maker.forward_and_backward()
        found.append(held(maker))
    assert all(oracles.relative_error(a, b) < 1e-12 for a, b in zip(*reversed(found), strict=True))


def test_the_exact_fisher_does_not_need_them() -> None:
    """It is right in the blind spot, where nothing is run alone for it."""
    model, x, t, turned = build("time first, layers flat", 2 * N)
    maker = custom(model, FisherExact(), FULL)
    declare(maker, model, x, t, loss_of(turned))
    maker.forward_and_backward()
    assert not maker.checks.arrangement.last
    first = held(maker)[0]
    model, x, t, turned = build("example first", 2 * N)
    maker = custom(model, FisherExact(), FULL)
    declare(maker, model, x, t, loss_of(turned))
    maker.forward_and_backward()
    assert oracles.relative_error(first, held(maker)[0]) < 1e-12


@pytest.mark.parametrize("name", ["time first, layers flat", "views concatenated", "example first, layers flat"])
def test_the_call_of_a_loop_is_made_again(name: str) -> None:
    model, x, t, turned = build(name, 2 * N)
    maker = attached(model, FULL, loss_of(turned), x, t)
    expected = by_examples(maker, model, x, t, loss_of(turned), 1 / N, N * 2 * N)
    assert oracles.relative_error(held(maker)[0][0], expected) < 1e-12


def test_dropout_before_all_layers_does_not() -> None:
    """What goes into them is what it is for an example alone in evaluation mode only."""
    model, x, t, turned = build("time first, layers flat", 2 * N, dropout=0.5)
    model.rows = lambda m, x: m.second(m.first(m.drop(features(x.transpose(0, 1)))).tanh())
    maker = custom(model, FisherEmp(), FULL)
    declare(maker, model, x, t, loss_of(turned))
    maker.forward_and_backward()
    assert maker.checks.arrangement.last and "groups" not in maker.checks.arrangement.notes
    assert all(m.training for m in model.modules())


def test_masks_of_a_loop_are_read_in_that_order() -> None:
    model, x, t, turned = build("time first, layers flat", 2 * N)
    t = t.masked_fill(torch.arange(t.numel()).reshape(t.shape) % 7 < 3, -100)
    maker = attached(model, Kron(), loss_of(turned), x, t)
    other, *_ = build("time first, layers flat", 2 * N)
    declared = custom(other, FisherEmp(), Kron())
    declare(declared, other, x, t, loss_of(turned))
    declared.forward_and_backward()
    assert all(oracles.relative_error(a, b) < 1e-12 for a, b in zip(held(maker), held(declared), strict=True))


@pytest.mark.parametrize("tokens", [False, True])
def test_dropout_does_not_hide_the_order(tokens: bool) -> None:
    name = "time first, layers flat"
    model, x, t, turned = build(name, 2 * N, tokens, 0.5)
    model.rows = TOKENS[name] if tokens else model.rows
    maker = custom(model, FisherEmp(), FULL)
    declare(maker, model, x, t, loss_of(turned))
    maker.forward_and_backward()
    assert maker.checks.arrangement.last and "groups" not in maker.checks.arrangement.notes
    assert all(m.training for m in model.modules())


class Noisy(nn.Module):
    """What goes into its layers is drawn anew in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        return flat(self.layer(x + torch.randn_like(x)))


def test_what_cannot_be_told_is_noted() -> None:
    """Noise that no mode switches off."""
    model, (_, x, t, _) = Noisy().double(), build("example first", 6)
    maker = custom(model, FisherEmp(), FULL)
    declare(maker, model, x, t, loss_of(False))
    maker.forward_and_backward()
    assert "could not be checked" in maker.checks.arrangement.notes["groups"]
    assert "could not be checked" in str(maker.summary())


def test_layers_without_a_gradient_prove_nothing() -> None:
    """Behind a head of zeros the lookup is as the inputs are, and the loss is not."""
    model, x, t, _ = build("example first", 2 * N, tokens=True)
    model.rows = lambda m, x: m.second(flat(m.first(x).tanh().transpose(0, 1)))
    with torch.no_grad():
        model.second.weight.zero_()
    maker = custom(model, FisherEmp(), FULL)
    declare(maker, model, x, t, loss_of(True))
    maker.forward_and_backward()
    expected = by_examples(maker, model, x, t, loss_of(True), 1 / N, N * 2 * N)
    assert oracles.relative_error(held(maker)[0][0], expected) < 1e-12


def test_squares_beside_products() -> None:
    """The diagonal of the empirical Fisher matrix groups rows as well."""
    found = []
    for layout in ("example first", "time first, layers flat"):
        model, x, t, turned = build(layout, 2 * N)
        maker = from_config(model, {"method": "ksd", "dimension": 2})
        declare(maker, model, x, t, loss_of(turned))
        maker.forward_and_backward()
        found.append(torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]))
    assert oracles.relative_error(found[1], found[0]) < 1e-10


def test_what_groups_rows_says_so() -> None:
    told: list[Representation] = [Kron(), Kron(sharing="reduce"), Eigenbasis(), KronRows(reduction="none"), KronRows()]
    assert [r.groups for r in told] == [False, True, False, False, True]
    curvatures: list[Curvature] = [FisherExact(), FisherEmp(), FisherEmp(examples="token"), GaussNewton(squares=True)]
    assert ["examples" in c.needs for c in curvatures] == [False, True, False, True]


def test_a_defect_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check the matrix is another one."""
    monkeypatch.setattr(checks, "check_groups", lambda *_: True)
    model, x, t, turned = build("time first, layers flat", 2 * N)
    maker = custom(model, FisherEmp(), FULL)
    declare(maker, model, x, t, loss_of(turned))
    maker.forward_and_backward()
    expected = by_examples(maker, model, x, t, loss_of(turned), 1 / N, N * 2 * N)
    assert oracles.relative_error(held(maker)[0][0], expected) > 0.3
