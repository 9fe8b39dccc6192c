"""Products on other data than the gradient: a batch that is declared for them, and samples of the examples of a step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import METHODS, GradientMaker, from_config
from gradmaker.curvature import GaussNewton, Hessian
from gradmaker.methods.custom import CustomGradientConfig
from gradmaker.representations import Implicit
from gradmaker.solvers import CG, Krylov
from tests import models, oracles
from tests.models import Case
from tests.passes.test_products import MATRIX_FREE, dense, noisy, step
from tests.solvers.test_matrix_free import gradient

Loss = Callable[[Any, Tensor], Tensor]


def declare(maker: Any, case: Case, other: Case, purpose: str = "curvature") -> None:
    maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x), case.t)
    maker.setup_loss_call(other.loss, getattr(maker, f"setup_{purpose}_call")(case.model, other.x), other.t)


def both(maker: Any, case: Case, other: Case) -> Tensor:
    case.model.zero_grad(set_to_none=True)
    declare(maker, case, other)
    maker.forward_and_backward()
    return oracles.gradient_vector(case.model)


def solver(curvature: Any, model: nn.Module, damping: float = 0.1, **options: Any) -> Any:
    krylov = isinstance(curvature, Hessian)  # which may be indefinite
    way = Krylov(damping=damping, dimension=60) if krylov else CG(damping=damping, iterations=2000, tolerance=1e-13)
    config = CustomGradientConfig(curvature=curvature, representation=Implicit(), solver=way, **options)
    return METHODS["custom"](model, config)


def solved(C: Tensor, g: Tensor, damping: float = 0.1) -> Tensor:
    s, Q = torch.linalg.eigh(C)
    x: Tensor = (Q / (s.abs() + damping)) @ Q.mT @ g
    return x


def part(case: Case, rows: Any) -> Case:
    return case._replace(x=case.x[rows], t=case.t[rows])


def cut(make: Callable[[], Case], rows: Any, loss: Loss | None = None) -> Case:
    """Some of the examples of a case, with their own copy of the model."""
    case = make()
    return part(case if loss is None else case._replace(loss=loss), rows)


# --- a batch of its own -----------------------------------------------------------------------------------------------------
MODES: dict[str, Any] = {
    "ggn": GaussNewton(),
    "reverse": Hessian(),
    "forward": Hessian(mode="forward"),
    "difference": Hessian(mode="difference"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["mlp", "batch_norm", "tagger_torch"])
def test_products_are_of_the_declared_batch(name: str, mode: str) -> None:
    """The gradient is that of the first, the matrix that of the second; another number of examples, another reduction."""
    make = models.ZOO[name] if name in models.ZOO else models.tagger
    case = make()
    loss: Loss = partial(F.cross_entropy, reduction="sum") if case.t.ndim == 1 else case.loss
    other = cut(make, slice(0, 4), loss)
    g, C = gradient(case), dense(other, "ggn" if mode == "ggn" else "hessian")
    found = both(solver(MODES[mode], case.model), case, other)
    assert oracles.relative_error(found, solved(C, g)) < (1e-5 if mode == "difference" else 1e-8)


def test_losses_at_displaced_weights_are_those_of_the_pass() -> None:
    """Backtracking, line search and ratio ask the batch of the gradient; the other one is evaluated once, for its graph."""

    class Counted:
        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, y: Tensor, t: Tensor) -> Tensor:
            self.calls += 1
            return F.cross_entropy(y, t)

    own, its = Counted(), Counted()
    maker: Any = from_config(models.mlp().model, {"method": "hessian_free"})
    case = Case(maker.model, models.mlp().x, models.mlp().t, own)
    both(maker, case, part(case, slice(0, 4))._replace(loss=its))
    assert its.calls == 1 and own.calls > 3


def test_micro_batches_have_batches_of_their_own() -> None:
    case = models.mlp()
    halves = [(slice(0, 2), slice(3, 5), 1 / 3), (slice(2, 6), slice(0, 3), 2 / 3)]
    C = sum((w * dense(cut(models.mlp, rows), "ggn") for _, rows, w in halves), torch.zeros(()))
    expected = solved(C, gradient(case))
    maker = solver(GaussNewton(), case.model)
    for own, rows, weight in halves:
        declare(maker, part(case, own), part(case, rows))
        maker.accumulate(weight)
    maker.precondition()
    assert oracles.relative_error(oracles.gradient_vector(case.model), expected) < 1e-8


@pytest.mark.parametrize("method", [*MATRIX_FREE, "newton", "psgd", "adahessian"])
def test_it_holds_for_one_step_and_leaves_no_trace(method: str) -> None:
    """Random state and running statistics are those of the pass alone; the next step is as if there had been none."""
    case, twin = noisy(), noisy()
    maker, plain = (from_config(c.model, {"method": method}) for c in (case, twin))
    for k in range(4):
        torch.manual_seed(k)
        found = both(maker, case, cut(noisy, slice(0, 5))) if k == 1 else step(maker, case)
        after = torch.get_rng_state()
        torch.manual_seed(k)
        expected = step(plain, twin)
        assert torch.equal(after, torch.get_rng_state())
        for mine, its in zip(case.model.buffers(), twin.model.buffers(), strict=True):
            assert torch.equal(mine, its)
        if k == 0:
            assert torch.equal(found, expected)
        if k == 1:
            assert oracles.relative_error(found, expected) > 1e-4
            plain.load_state_dict(maker.state_dict())  # what the other batch has left in statistics
    assert oracles.relative_error(found, expected) < 1e-12


def test_gradients_are_as_ever_besides_the_graph() -> None:
    """The pass itself is differentiated once, by an ordinary backward pass: an optimizer of plain gradients sees the same."""
    case, twin = models.mlp(), models.mlp()
    maker: Any = from_config(case.model, {"method": "hessian_free", "ignore": ("2",)})
    both(maker, case, cut(models.mlp, slice(0, 3)))
    twin.run().backward()
    for mine, its in zip(case.model.get_submodule("2").parameters(), twin.model.get_submodule("2").parameters(), strict=True):
        assert torch.equal(mine.grad, its.grad)


def test_what_is_declared_wrongly_is_refused() -> None:
    case = models.mlp()
    maker: Any = from_config(case.model, {"method": "hessian_free"})
    with pytest.raises(RuntimeError, match="setup_curvature_call: call setup_model_call"):
        maker.setup_curvature_call(case.model, case.x)
    y = maker.setup_model_call(case.model, case.x)
    with pytest.raises(TypeError, match="setup_curvature_call: expected a callable"):
        maker.setup_curvature_call(case.x)
    maker.setup_loss_call(case.loss, y, case.t)
    z = maker.setup_curvature_call(case.model, case.x[:2])
    with pytest.raises(RuntimeError, match="setup_curvature_call: no loss"):
        maker.forward_and_backward()
    maker.setup_loss_call(case.loss, z, case.t[:2])
    maker.forward_and_backward()
    with pytest.raises(ValueError, match=r"setup_search_call: .* has no use for a second batch"):
        maker.setup_search_call(case.model, case.x)
    maker.setup_model_call(case.model, case.x)
    with pytest.raises(ValueError, match="is not computed from the latest"):
        maker.setup_loss_call(case.loss, z, case.t[:2])  # of the step before


@pytest.mark.parametrize("method", ["kfac", "adam", "lbfgs", "gradient"])
def test_methods_without_products_refuse_it(method: str) -> None:
    case = models.mlp()
    maker: Any = GradientMaker(case.model) if method == "gradient" else from_config(case.model, {"method": method})
    maker.setup_model_call(case.model, case.x)
    with pytest.raises(ValueError, match="has no use for a second batch"):
        maker.setup_curvature_call(case.model, case.x)


# --- samples of the examples ------------------------------------------------------------------------------------------------
def matching(found: Tensor, make: Callable[[], Case], size: int, scale: float, loss: Loss | None = None) -> list[Any]:
    """Every choice of examples whose matrix, times ``scale``, explains a direction."""
    case = make() if loss is None else make()._replace(loss=loss)
    g = gradient(case)
    rows = combinations(range(len(case.x)), size)
    return [r for r in rows if oracles.relative_error(found, solved(scale * dense(cut(make, list(r), loss), "ggn"), g)) < 1e-7]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_products_are_of_a_sample(reduction: str) -> None:
    """Of two examples of six, others at every step; a sum counts them three times."""
    loss: Loss = partial(F.cross_entropy, reduction=reduction)
    case, seen = models.mlp()._replace(loss=loss), set()
    maker = solver(GaussNewton(examples=2), case.model)
    for _ in range(6):
        (rows,) = matching(step(maker, case), models.mlp, 2, 3.0 if reduction == "sum" else 1.0, loss)
        seen.add(rows)
    assert len(seen) >= 4


@pytest.mark.parametrize("name", ["tagger_last", "tagger_flat", "attention", "embedding_mean", "batch_norm"])
def test_samples_of_other_models(name: str) -> None:
    """Sequences, indices, batch norm on the sample's own statistics."""
    case = models.ZOO[name]()
    maker = solver(GaussNewton(examples=2), case.model)
    assert len(matching(step(maker, case), models.ZOO[name], 2, 1.0)) == 1


@pytest.mark.parametrize("form", ["tuple", "dict", "dataclass"])
def test_samples_of_results_with_parts(form: str) -> None:
    """A loss from inside the model, and arguments in containers, by position and by keyword."""
    case = models.structured(form)
    flat = nn.Sequential(case.model.get_submodule("first"), nn.Tanh(), case.model.get_submodule("head"))

    def make() -> Case:
        return Case(flat, case.x, case.t, F.cross_entropy)

    maker = solver(GaussNewton(examples=2), case.model)
    y = maker.setup_model_call(lambda data, labels: case.model(data["x"][0], labels), {"x": [case.x]}, labels=case.t)
    maker.setup_loss_repr(y.loss if form == "dataclass" else y["loss"] if form == "dict" else y[0])
    maker.forward_and_backward()
    assert len(matching(oracles.gradient_vector(case.model), make, 2, 1.0)) == 1


def test_an_unrecognised_loss_is_scaled_as_declared() -> None:
    loss: Loss = lambda y, t: F.huber_loss(y, t, delta=40.0, reduction="sum")  # noqa: E731
    case = models.mlp_gaussian()._replace(loss=loss)
    for reduction, scale in (("mean", 1.0), ("sum", 3.0)):
        maker = solver(GaussNewton(examples=2), case.model, loss_reduction=reduction)
        y = maker.setup_model_call(case.model, case.x)
        maker.setup_loss_call(loss, y, case.t)
        maker.setup_logits_repr(y)
        case.model.zero_grad(set_to_none=True)
        maker.forward_and_backward()
        assert len(matching(oracles.gradient_vector(case.model), models.mlp_gaussian, 2, scale, loss)) == 1


def test_samples_of_the_declared_batch() -> None:
    """Both at once: some of the examples of the curvature's batch, on the scale of the whole of it."""
    loss: Loss = partial(F.cross_entropy, reduction="sum")
    case = models.mlp()
    other = cut(models.mlp, slice(1, 5), loss)
    found, g = both(solver(GaussNewton(examples=2), case.model), case, other), gradient(case)
    rows = combinations(range(1, 5), 2)
    explained = [
        r for r in rows if oracles.relative_error(found, solved(2 * dense(cut(models.mlp, list(r), loss), "ggn"), g)) < 1e-7
    ]
    assert len(explained) == 1


def test_samples_depend_on_seed_and_step_alone() -> None:
    found = []
    for seed in (0, 0, 1):
        case = models.mlp()
        maker = solver(GaussNewton(examples=2), case.model, seed=seed)
        torch.manual_seed(len(found))
        before = torch.get_rng_state()
        found.append(torch.stack([step(maker, case) for _ in range(3)]))
        assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_no_more_examples_than_there_are() -> None:
    """The last batch of an epoch may be smaller: all of it."""
    case = models.mlp()
    expected = solved(dense(models.mlp(), "ggn"), gradient(case))
    assert oracles.relative_error(step(solver(GaussNewton(examples=50), case.model), case), expected) < 1e-8


@pytest.mark.parametrize("method", MATRIX_FREE)
def test_every_method_takes_samples(method: str) -> None:
    case, twin = models.mlp(), models.mlp()
    options = {"method": method, "curvature_examples": 3}
    found = step(from_config(case.model, options), case)
    assert found.isfinite().all() and torch.equal(found, step(from_config(twin.model, options), twin))
    assert oracles.relative_error(found, step(from_config(twin.model, {"method": method}), twin)) > 1e-6


def test_data_that_cannot_be_cut() -> None:
    case = models.mlp()
    maker = solver(GaussNewton(examples=2), case.model)
    maker.setup_loss_call(lambda y: F.cross_entropy(y, case.t), maker.setup_model_call(case.model, case.x))
    with pytest.raises(ValueError, match=r"failed on 2 of the 6 examples: .*setup_curvature_call"):
        maker.forward_and_backward()
    maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(lambda: case.model(case.x)), case.t)
    with pytest.raises(ValueError, match="no tensor among its arguments"):
        maker.forward_and_backward()
    for bad in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="examples"):
            from_config(case.model, {"method": "hessian_free", "curvature_examples": bad})


def test_a_failed_sample_leaves_everything_as_it_was() -> None:
    case = models.mlp()
    maker = solver(GaussNewton(examples=2), case.model)
    state = copy.deepcopy(maker.state_dict())
    maker.setup_loss_call(lambda y: F.cross_entropy(y, case.t), maker.setup_model_call(case.model, case.x))
    with pytest.raises(ValueError, match="failed on 2"):
        maker.forward_and_backward()
    assert all(p.grad is None for p in case.model.parameters()) and maker.state_dict()["step"] == state["step"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in case.model.modules())
    assert step(maker, case).isfinite().all()


def test_examples_are_drawn_along_their_axis() -> None:
    """Of inputs with time first, as many as examples, a sample is one of examples and not of times."""
    torch.manual_seed(0)
    x, t = torch.randn(4, 4, 3, dtype=torch.float64), torch.randint(2, (4, 4))

    def make() -> nn.Sequential:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def loss(y: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(y.transpose(1, 2), t)

    seen: list[Tensor] = []
    model = make()
    model.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    maker = from_config(model, {"method": "hessian_free", "curvature_examples": 2, "batch_axis": 1})
    maker.setup_loss_call(loss, maker.setup_model_call(model, x), t)
    maker.forward_and_backward()
    drawn = [v for v in seen if v.shape == (4, 2, 3)]
    assert drawn and all(v.shape[0] == 4 for v in seen)
    assert all(any(torch.equal(v[:, j], x[:, k]) for k in range(4)) for v in drawn for j in range(2))
