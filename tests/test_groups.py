"""What groups rows by example groups them as the inputs do, whatever the layout; else each example is evaluated alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import CustomGradientConfig, CustomGradientMaker, from_config
from gradmaker.curvature import Curvature, FisherEmp, FisherExact, GaussNewton
from gradmaker.errors import SelfCheckError, SelfCheckWarning
from gradmaker.representations import Dense, Eigenbasis, Kron, KronRows, Representation
from gradmaker.self_checks import checks
from gradmaker.solvers import Cholesky, Rotate
from tests import oracles
from tests.measure import custom

N, D, C = 4, 3, 3
FULL = Dense(granularity="full")
Rows = Callable[[nn.Module, Tensor], Tensor]


class Pointwise(nn.Module):
    """A layer for each position, in some order of rows."""

    def __init__(self, rows: Rows, first: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.rows, self.first, self.second, self.drop = rows, first, nn.Linear(5, C), nn.Dropout(dropout)

    def body(self, x: Tensor) -> Tensor:
        z: Tensor = self.second(self.drop(self.first(x).tanh()))
        return z

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(self, x)  # (rows, C)


def flat(z: Tensor) -> Tensor:
    return z.flatten(0, -2)


def features(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


BODY: Any = Pointwise.body
ORDERS: dict[str, tuple[Rows, bool]] = {
    "example first": (lambda m, x: flat(BODY(m, x)), False),
    "example first, layers flat": (lambda m, x: BODY(m, features(x)), False),
    "time first": (lambda m, x: flat(BODY(m, x.transpose(0, 1))), True),
    "time first, layers flat": (lambda m, x: BODY(m, features(x.transpose(0, 1))), True),
    "time first in the loss alone": (lambda m, x: flat(BODY(m, x).transpose(0, 1)), True),
    "layers flat time first, loss example first": (
        lambda m, x: flat(BODY(m, features(x.transpose(0, 1))).unflatten(0, (x.shape[1], -1)).transpose(0, 1)),
        False,
    ),
    "views concatenated": (lambda m, x: BODY(m, torch.cat([x[:, j] for j in range(x.shape[1])])), True),
    "views one by one": (lambda m, x: torch.cat([BODY(m, x[:, j]) for j in range(x.shape[1])]), True),
}
"""How rows are laid out, and whether the loss has positions first."""


def build(name: str, T: int, tokens: bool = False, dropout: float = 0.0) -> tuple[nn.Module, Tensor, Tensor, bool]:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rows, turned = ORDERS[name]
        model = Pointwise(rows, nn.Embedding(11, 5) if tokens else nn.Linear(D, 5), dropout).double()
    x = torch.randint(11, (N, T), generator=generator) if tokens else torch.randn(N, T, D, generator=generator).double()
    return model, x, torch.randint(C, (N, T), generator=generator), turned


def loss_of(turned: bool, reduction: str = "mean") -> Callable[[Tensor, Tensor], Tensor]:
    return lambda z, t: F.cross_entropy(z, (t.T if turned else t).reshape(-1), reduction=reduction)


def declare(maker: Any, model: nn.Module, x: Tensor, t: Tensor, loss: Any) -> None:
    maker.setup_loss_call(loss, maker.setup_model_call(model, x), t)


def held(maker: CustomGradientMaker) -> list[Tensor]:
    return [b.triple.representation.to_dense(b.state) for b in maker.plan.blocks]


def by_examples(maker: Any, model: nn.Module, x: Tensor, t: Tensor, loss: Any, weight: float, M: float) -> Tensor:
    """``M sum_n g_n g_n^T`` with the gradients of the loss of each example by itself, times its weight in the batch."""
    found = []
    for n in range(len(x)):
        g = torch.autograd.grad(weight * loss(model(x[n : n + 1]), t[n : n + 1]), list(model.parameters()))
        values = dict(zip(model.parameters(), g, strict=True))
        found.append(torch.cat([s.lay_out(dict(values)).reshape(-1) for b in maker.plan.blocks for s in b.sites]))
    rows = torch.stack(found)
    return M * rows.T @ rows


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


def attached(model: nn.Module, representation: Representation, loss: Any, x: Tensor, t: Tensor) -> CustomGradientMaker:
    maker = custom(model, FisherEmp(), representation)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    maker.attach(optimizer, likelihood="categorical")
    loss(model(x), t).backward()
    optimizer.step()
    return maker


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


def unrecognised(z: Tensor, t: Tensor, kept: Tensor) -> Tensor:
    return -z[kept].log_softmax(-1).gather(-1, t[kept].unsqueeze(-1)).sum()


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


@pytest.mark.parametrize("squares", [False, True])
def test_a_mean_over_unequal_rows(squares: bool) -> None:
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
    assert [c.groups for c in curvatures] == [False, True, False, True]


def test_a_defect_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check the matrix is another one."""
    monkeypatch.setattr(checks, "check_groups", lambda *_: True)
    model, x, t, turned = build("time first, layers flat", 2 * N)
    maker = custom(model, FisherEmp(), FULL)
    declare(maker, model, x, t, loss_of(turned))
    maker.forward_and_backward()
    expected = by_examples(maker, model, x, t, loss_of(turned), 1 / N, N * 2 * N)
    assert oracles.relative_error(held(maker)[0][0], expected) > 0.3
