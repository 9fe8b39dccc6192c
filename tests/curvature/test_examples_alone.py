"""Where a pass does not show which rows are whose, each example is evaluated alone, or it is an error."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker.curvature import FisherEmp, FisherExact
from gradmaker.errors import SelfCheckError, SelfCheckWarning
from gradmaker.representations import Kron
from tests import oracles
from tests.measure import custom
from tests.pointwise import (
    BODY,
    FULL,
    C,
    D,
    N,
    attached,
    build,
    by_examples,
    declare,
    features,
    held,
)


# ------------------------------------------------------------------ no order fits
class Shuffled(nn.Module):
    """Rows of examples lie in pairs: neither order is that of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        rows = features(x)
        order = torch.arange(len(rows)).reshape(2, -1).T.reshape(-1).flip(0)
        z: Tensor = self.layer(rows[order])
        return z


def shuffled_loss(z: Tensor, t: Tensor) -> Tensor:
    t = t.reshape(-1)
    return F.cross_entropy(z, t[torch.arange(len(t)).reshape(2, -1).T.reshape(-1).flip(0)])


def test_rows_in_no_order_are_evaluated_alone() -> None:
    (_, x, t, _), model = build("example first", 6), Shuffled().double()
    maker = custom(model, FisherEmp(), FULL)
    declare(maker, model, x, t, shuffled_loss)
    with pytest.warns(SelfCheckWarning, match="alone|for each"):
        maker.forward_and_backward()
    expected = by_examples(maker, model, x, t, shuffled_loss, 1 / N, N * 6)
    assert oracles.relative_error(held(maker)[0][0], expected) < 1e-12
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was said
        maker.forward_and_backward()
    assert oracles.relative_error(held(maker)[0][0], expected) < 1e-12


def test_rows_that_are_chosen_before_the_layers() -> None:
    """As many as would divide: two for each of four examples, but three, one, two and two they are."""
    model, x, t, _ = build("example first", 3)
    kept = torch.arange(3) < torch.tensor([3, 1, 2, 2]).unsqueeze(1)
    model.rows = lambda m, xs: BODY(m, xs[0][xs[1]])
    maker = custom(model, FisherEmp(), FULL)
    y = maker.setup_model_call(lambda x, kept: model((x, kept)), x, kept)
    maker.setup_loss_call(lambda z, t, kept: F.cross_entropy(z, t[kept]), y, t, kept)
    with pytest.warns(SelfCheckWarning, match="for each"):
        maker.forward_and_backward()
    rows = []
    for n in range(N):
        z = model((x[n : n + 1], kept[n : n + 1]))
        loss = F.cross_entropy(z, t[n][kept[n]], reduction="sum") / 8**0.5
        values = dict(zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True))
        rows.append(torch.cat([s.lay_out(dict(values)).reshape(-1) for b in maker.plan.blocks for s in b.sites]))
    J = torch.stack(rows)
    assert oracles.relative_error(held(maker)[0][0], J.T @ J) < 1e-12


def test_a_statistic_that_groups_them_itself_is_refused() -> None:
    (_, x, t, _), model = build("example first", 6), Shuffled().double()
    maker = custom(model, FisherExact(), Kron(sharing="reduce"))
    declare(maker, model, x, t, shuffled_loss)
    with pytest.raises(SelfCheckError, match=r"batch_axis=.*sharing='expand'"):
        maker.forward_and_backward()
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_attached_it_is_refused_too() -> None:
    (_, x, t, _), model = build("example first", 6), Shuffled().double()
    with pytest.warns(SelfCheckWarning), pytest.raises(SelfCheckError, match="give the examples on one axis"):
        attached(model, FULL, shuffled_loss, x, t)


# ------------------------------------------------------------------ examples alone
def masked_case() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Unequal numbers of rows, one of them zero."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, C)).double()
    _, x, t, _ = build("example first", 6)
    kept = torch.arange(6) < torch.tensor([3, 1, 0, 6]).unsqueeze(1)
    return model, x, t, kept


def masked_loss(z: Tensor, t: Tensor, kept: Tensor) -> Tensor:
    return F.cross_entropy(z[kept], t[kept])


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SelfCheckWarning)
        yield


def masked_rows(maker: Any, model: nn.Module, x: Tensor, t: Tensor, kept: Tensor, root: Sequence[float]) -> Tensor:
    """``sqrt(M_n) g_n``, of sums over the counted rows of each example."""
    found = []
    for n in range(N):
        each = F.cross_entropy(model(x[n]), t[n], reduction="none")
        g = torch.autograd.grad(root[n] * each[kept[n]].sum(), list(model.parameters()))
        values = dict(zip(model.parameters(), g, strict=True))
        found.append(torch.cat([s.lay_out(dict(values)).reshape(-1) for b in maker.plan.blocks for s in b.sites]))
    return torch.stack(found)


def test_a_mean_over_unequal_rows() -> None:
    """As of masked language models: the sequence, not the token, is the example."""
    model, x, t, kept = masked_case()
    maker = custom(model, FisherEmp(), FULL)
    y = maker.setup_model_call(model, x)
    maker.setup_loss_call(masked_loss, y, t, kept)
    with quiet():
        for _ in range(2):  # the second pass is not checked
            maker.forward_and_backward()
    total = float(kept.sum())
    rows = masked_rows(maker, model, x, t, kept, [total**-0.5] * N)  # M / total^2
    expected = rows.T @ rows
    assert oracles.relative_error(held(maker)[0][0], expected) < 1e-12


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_factors_of_unequal_rows(sharing: Any) -> None:
    """Gradients as of ignored terms, another spelling of this loss; inputs of all positions of examples that count."""
    factors = []
    for left_out in (True, False):
        model, x, t, kept = masked_case()
        maker = custom(model, FisherEmp(), Kron(sharing=sharing))
        y = maker.setup_model_call(model, x)
        if left_out:
            maker.setup_loss_call(masked_loss, y, t, kept)
        else:
            maker.setup_loss_call(lambda z, t: F.cross_entropy(z.mT, t), y, t.masked_fill(~kept, -100))
        with quiet():
            maker.forward_and_backward()
        block = maker.plan.blocks[0]
        assert isinstance(block.triple.representation, Kron)
        factors.append(block.triple.representation.factors(block.state))
    assert oracles.relative_error(factors[0][0], factors[1][0]) < 1e-12
    a = F.pad(x[kept.any(1)], (0, 1), value=1.0)
    a = a.mean(1) if sharing == "reduce" else a.flatten(0, 1)
    assert oracles.relative_error(factors[0][1][0], a.T @ a / len(a)) < 1e-12


def test_an_unrecognised_sum_over_unequal_rows() -> None:
    model, x, t, kept = masked_case()
    maker = custom(model, FisherEmp(), FULL, loss_reduction="sum")
    y = maker.setup_model_call(lambda x, kept: model(x)[kept], x, kept)
    maker.setup_loss_call(lambda z, t, kept: -z.log_softmax(-1).gather(-1, t[kept].unsqueeze(-1)).sum(), y, t, kept)
    with quiet():
        for _ in range(2):
            maker.forward_and_backward()
    rows = masked_rows(maker, model, x, t, kept, [1.0] * N)
    assert oracles.relative_error(held(maker)[0][0], rows.T @ rows) < 1e-12


def test_data_that_is_not_declared_cannot_be_cut() -> None:
    """Then the terms take the place of examples, as where examples depend on each other."""
    model, x, t, kept = masked_case()
    maker = custom(model, FisherEmp(), FULL)
    maker.setup_loss_call(lambda z: masked_loss(z, t, kept), maker.setup_model_call(lambda: model(x)))
    with quiet():
        maker.forward_and_backward()
    assert "examples" not in maker.checks.arrangement.notes
    each = F.cross_entropy(model(x)[kept], t[kept], reduction="none")
    rows = []
    for term in each:
        values = dict(
            zip(model.parameters(), torch.autograd.grad(term, list(model.parameters()), retain_graph=True), strict=True)
        )
        rows.append(torch.cat([s.lay_out(dict(values)).reshape(-1) for b in maker.plan.blocks for s in b.sites]))
    J = torch.stack(rows)
    assert oracles.relative_error(held(maker)[0][0], J.T @ J / len(J)) < 1e-12


def test_examples_that_depend_on_each_other_are_not_evaluated_alone() -> None:
    model = nn.Linear(D, 5).double()
    x = build("example first", 1)[1][:, 0]
    maker = custom(model, FisherEmp(), FULL)
    y = maker.setup_model_call(lambda x: model(x) @ model(x).T, x)
    maker.setup_loss_call(lambda z: F.cross_entropy(z, torch.arange(len(z))), y)
    with quiet():
        maker.forward_and_backward()
    assert "examples" not in maker.checks.arrangement.notes and held(maker)[0].norm() > 0
