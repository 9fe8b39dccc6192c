"""Cotangents of losses against the dense Hessian in the logits, which for these convex losses is the GGN itself."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker.loss.likelihood import (
    LIKELIHOODS,
    Bernoulli,
    Categorical,
    Gaussian,
    find_likelihood,
    read_terms,
    terms_from_gradient,
)
from gradmaker.loss.recorder import LossRecorder
from gradmaker.loss.terms import Terms

pytestmark = [pytest.mark.usefixtures("double"), pytest.mark.filterwarnings("ignore:size_average and reduce")]

N, C, T = 3, 4, 2
Loss = Callable[[Tensor], Tensor]


def labels(*shape: int) -> Tensor:
    return torch.randint(C, shape, generator=torch.Generator().manual_seed(3))


def uniform(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def ignoring(target: Tensor, index: int = -100) -> Tensor:
    return target.index_fill(0, torch.tensor([1]), index)


def read(loss: Loss, z: Tensor) -> list[Terms]:
    with LossRecorder() as recorder:
        value = loss(z)
    return read_terms(recorder, value)


def point(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).requires_grad_()


def blocks(s: Tensor, examples: int) -> Tensor:
    """Sum of outer products, example by example.  # (k, *z.shape) -> (n, P, P)"""
    flat = s.reshape(s.shape[0], examples, -1)
    return torch.einsum("knp,knq->npq", flat, flat)


def hessian(loss: Loss, z: Tensor, examples: int) -> Tensor:
    """The diagonal blocks of the dense Hessian; the others must be zero.  # (n, P, P)"""
    P = z.numel() // examples
    H = torch.autograd.functional.hessian(loss, z.detach()).reshape(examples, P, examples, P)
    out = torch.stack([H[n, :, n] for n in range(examples)])
    assert torch.allclose(H.square().sum(), out.square().sum())
    return out


def exact(terms: list[Terms], examples: int, chunk: int | None = None) -> Tensor:
    return torch.cat([s for t in terms for s in t.exact(examples, chunk)])


w = torch.tensor([0.5, 2.0, 1.0, 0.25], dtype=torch.float64)
soft = uniform(N, C) / uniform(N, C).sum(1, keepdim=True)
soft_t = uniform(N, C, T)  # not normalised: the curvature scales with the mass of the target
mask = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
y, y_t = labels(N), labels(N, T)

OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.2},
    "weights": {"weight": w},
    "weights, smoothing": {"weight": w, "label_smoothing": 0.3},
    "ignore": {"ignore_index": 2},
    "ignore, weights, smoothing": {"ignore_index": 2, "weight": w, "label_smoothing": 0.3},
}
assert (y == 2).any() or (y_t == 2).any()

CASES: dict[str, tuple[Loss, tuple[int, ...], int]] = {}
for name, options in OPTIONS.items():
    for reduction in ("mean", "sum"):
        ce = functools.partial(F.cross_entropy, reduction=reduction, **options)
        CASES[f"ce {name} {reduction}"] = (functools.partial(ce, target=ignoring(y, 2)), (N, C), N)
        CASES[f"ce {name} {reduction} (N,C,T)"] = (functools.partial(ce, target=y_t), (N, C, T), N)
        CASES[f"ce {name} {reduction} flat"] = (functools.partial(ce, target=y_t.reshape(-1)), (N * T, C), N)
    none = functools.partial(F.cross_entropy, reduction="none", **options)
    CASES[f"ce {name} none"] = (lambda z, f=none: f(z, y).mean(), (N, C), N)
    CASES[f"ce {name} none (N,C,T)"] = (lambda z, f=none: (f(z, y_t) * mask[:, None]).sum() / 5, (N, C, T), N)
for name, options in {k: v for k, v in OPTIONS.items() if "ignore" not in k}.items():
    for reduction in ("mean", "sum"):
        ce = functools.partial(F.cross_entropy, reduction=reduction, **options)
        CASES[f"soft {name} {reduction}"] = (functools.partial(ce, target=soft), (N, C), N)
        CASES[f"soft {name} {reduction} (N,C,T)"] = (functools.partial(ce, target=soft_t), (N, C, T), N)
    CASES[f"soft {name} none"] = (
        lambda z, o=options: (F.cross_entropy(z, soft, reduction="none", **o) * mask).sum(),
        (N, C),
        N,
    )
CASES |= {
    "ce vector": (lambda z: F.cross_entropy(z, y[0]), (C,), 1),
    "ce soft vector": (lambda z: F.cross_entropy(z, soft[0], label_smoothing=0.1), (C,), 1),
    "ce (N,C,2,2)": (lambda z: F.cross_entropy(z, labels(N, 2, 2), weight=w), (N, C, 2, 2), N),
    "ce size_average": (lambda z: F.cross_entropy(z, y, size_average=False), (N, C), N),
    "ce reduce": (lambda z: F.cross_entropy(z, y, reduce=False).mean(), (N, C), N),
    "ce transposed": (lambda z: F.cross_entropy(z.t().contiguous().t(), y), (N, C), N),
    "mse mean": (lambda z: F.mse_loss(z, uniform(N, C)), (N, C), N),
    "mse sum": (lambda z: F.mse_loss(z, uniform(N, C), reduction="sum"), (N, C), N),
    "mse none": (lambda z: (F.mse_loss(z, uniform(N, C), reduction="none") * uniform(N, C)).mean(), (N, C), N),
    "mse swapped": (lambda z: F.mse_loss(uniform(N, C), z), (N, C), N),
    "mse weight": (lambda z: F.mse_loss(z, uniform(N, C), weight=uniform(N, C)), (N, C), N),
    "mse weight sum": (lambda z: F.mse_loss(z, uniform(N, C), weight=uniform(N, C), reduction="sum"), (N, C), N),
    "mse weight none": (lambda z: F.mse_loss(z, uniform(N, C), weight=uniform(N, C), reduction="none").sum(), (N, C), N),
    "mse 1-D": (lambda z: F.mse_loss(z, uniform(N)), (N,), N),
    "mse 1-D as one": (lambda z: F.mse_loss(z, uniform(N)), (N,), 1),
    "mse 0-D": (lambda z: F.mse_loss(z, uniform()), (), 1),
    "mse 3-D": (lambda z: F.mse_loss(z, uniform(N, T, C)), (N, T, C), N),
    "bce mean": (lambda z: F.binary_cross_entropy_with_logits(z, uniform(N, C)), (N, C), N),
    "bce sum": (lambda z: F.binary_cross_entropy_with_logits(z, uniform(N, C), reduction="sum"), (N, C), N),
    "bce none": (lambda z: F.binary_cross_entropy_with_logits(z, uniform(N), reduction="none") @ mask, (N,), N),
    "bce weight": (lambda z: F.binary_cross_entropy_with_logits(z, uniform(N, C), weight=mask[:, None]), (N, C), N),
    "bce pos_weight": (lambda z: F.binary_cross_entropy_with_logits(z, uniform(N, C), pos_weight=w), (N, C), N),
    "bce both 3-D": (lambda z: F.binary_cross_entropy_with_logits(z, uniform(N, T, C), w, pos_weight=w), (N, T, C), N),
    "nll": (lambda z: F.nll_loss(F.log_softmax(z, 1), y), (N, C), N),
    "nll weights, ignore": (lambda z: F.nll_loss(F.log_softmax(z, 1), y_t, w, ignore_index=2), (N, C, T), N),
    "factors": (lambda z: 0.3 * F.cross_entropy(z, y) / 4 + 0.7 * F.mse_loss(z, uniform(N, C)), (N, C), N),
    "factor tensor": (lambda z: torch.tensor(0.3) * F.cross_entropy(z, y), (N, C), N),
    "same loss twice": (lambda z: F.cross_entropy(z, y) + F.cross_entropy(z, 3 - y, reduction="sum"), (N, C), N),
    "affine": (lambda z: (5.0 - 2 * (1 - F.cross_entropy(z, y))).clone(), (N, C), N),
    "module": (lambda z: nn.CrossEntropyLoss(weight=w, label_smoothing=0.1)(z, y), (N, C), N),
    "module mse": (lambda z: nn.MSELoss()(z, uniform(N, C)), (N, C), N),
    "module bce": (lambda z: nn.BCEWithLogitsLoss(pos_weight=w)(z, uniform(N, C)), (N, C), N),
    "module nll": (lambda z: nn.NLLLoss()(nn.LogSoftmax(1)(z), y), (N, C), N),
}


def pulled(terms: list[Terms], z: Tensor, vectors: Callable[[Terms], Tensor]) -> Tensor:
    """Cotangents taken back from what the losses were given to z itself."""
    out = []
    for t in terms:
        for s in vectors(t):
            out.append(s if t.z is z else torch.autograd.grad(t.z, z, s, retain_graph=True)[0])
    return torch.stack(out)


@pytest.mark.parametrize("case", CASES)
def test_exact_is_the_hessian(case: str) -> None:
    loss, shape, examples = CASES[case]
    z = point(*shape)
    terms = read(loss, z)
    assert terms
    s = pulled(terms, z, lambda t: exact([t], examples))
    torch.testing.assert_close(blocks(s, examples), hessian(loss, z, examples), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_columns_keep_positions_apart(case: str) -> None:
    loss, shape, examples = CASES[case]
    for t in read(loss, point(*shape)):
        assert t.columns(examples) == len(exact([t], examples))
        assert t.columns(examples) == max(t.z.numel() // examples, 1)
        whole = exact([t], examples)
        for chunk in (1, 3, 1000):
            parts = list(t.exact(examples, chunk))
            assert all(len(part) <= chunk for part in parts)
            assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_samples_are_unbiased(case: str, samples: int) -> None:
    loss, shape, examples = CASES[case]
    z = point(*shape)
    generator, draws = torch.Generator().manual_seed(1), 3000
    for t in read(loss, z):
        flat = t.sample(samples * draws, generator).reshape(draws, samples, examples, -1) * draws**0.5
        products = torch.einsum("dknp,dknq->dnpq", flat, flat)  # one estimate of `samples` samples each
        error = products.mean(0) - blocks(exact([t], examples), examples)
        assert (error.abs() <= 5 * products.std(0) / draws**0.5 + 1e-12).all()


MC = {
    "ce": lambda z: F.cross_entropy(z, y),
    "ce smoothed": lambda z: F.cross_entropy(z, y, label_smoothing=0.4),
    "mse": lambda z: F.mse_loss(z, uniform(N, C), reduction="sum"),
    "bce": lambda z: F.binary_cross_entropy_with_logits(z, uniform(N, C), pos_weight=w),
}


@pytest.mark.parametrize("samples", [1, 2, 50])
@pytest.mark.parametrize("name", MC)
def test_trace_does_not_depend_on_the_number_of_samples(name: str, samples: int) -> None:
    (t,) = read(MC[name], point(N, C))
    generator = torch.Generator().manual_seed(2)
    traces = torch.stack([t.sample(samples, generator).square().sum() for _ in range(2000 // samples)])
    error = traces.mean() - exact([t], N).square().sum()
    assert error.abs() <= 5 * traces.std() / len(traces) ** 0.5


@pytest.mark.parametrize("name", MC)
def test_monte_carlo_error_falls_as_the_root_of_samples(name: str) -> None:
    (t,) = read(MC[name], point(N, C))
    generator, target = torch.Generator().manual_seed(2), blocks(exact([t], N), N)

    def error(samples: int) -> float:
        errors = [(blocks(t.sample(samples, generator), N) - target).square().sum() for _ in range(40)]
        return torch.stack(errors).mean().sqrt().log2().item()

    slope = (error(1024) - error(4)) / 8
    assert abs(slope + 0.5) <= 0.15


def test_smoothing_does_not_enter_the_sampled_target() -> None:
    z = point(N, C)
    (t,) = read(lambda z: F.cross_entropy(z, y, label_smoothing=0.5, reduction="sum"), z)
    residual = z.detach().softmax(1) - t.sample(1, torch.Generator().manual_seed(0))[0]
    torch.testing.assert_close(residual.sort(1).values, torch.eye(C)[[C - 1] * N])  # exactly one-hot


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("garbage", [0.0, float("inf"), float("nan")])
def test_ignored_terms_are_zero(reduction: str, garbage: float) -> None:
    z = (point(N, C).detach() + torch.tensor([[0.0], [garbage], [0.0]])).requires_grad_()
    (t,) = read(lambda z: F.cross_entropy(z, ignoring(y), reduction=reduction, label_smoothing=0.1), z)
    assert t.valid().tolist() == [True, False, True]
    assert t.masked()
    assert t.denominator == (2 if reduction == "mean" else 1)
    for s in (exact([t], N), t.sample(20, torch.Generator().manual_seed(0))):
        assert s.isfinite().all()
        assert (s[:, 1] == 0).all()
        assert (s[:, 0] != 0).any()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weight", [None, w])
def test_nothing_but_ignored_terms(reduction: str, weight: Tensor | None) -> None:
    nothing = torch.full((N,), -100)
    (t,) = read(lambda z: 0.5 * F.cross_entropy(z, nothing, weight, reduction=reduction), point(N, C))
    gradient = torch.zeros(N, C)
    for s in (exact([t], N), t.sample(2, torch.Generator()), t.empirical(gradient, N, torch.ones(N, 1)), t.omega):
        assert (s == 0).all()
    assert not t.valid().any()


def test_draws_come_from_the_generator_alone() -> None:
    for loss in MC.values():
        (t,) = read(loss, point(N, C))
        before = torch.get_rng_state()
        first, second, other = (t.sample(3, torch.Generator().manual_seed(seed)) for seed in (7, 7, 8))
        assert torch.equal(first, second)
        assert not torch.equal(first, other)
        assert torch.equal(torch.get_rng_state(), before)


def test_denominators_and_omegas() -> None:
    z, sharp = point(N, C), torch.tensor([0.25, 0.0, 0.5])
    of_class, of_soft = w[y] / w[y].sum(), soft.sum(1) / 3
    table = [
        (lambda z: F.cross_entropy(z, y), 3.0, [1 / 3] * 3),
        (lambda z: F.cross_entropy(z, y, reduction="sum") / 4, 4.0, [0.25] * 3),
        (lambda z: F.cross_entropy(z, y, reduction="none") @ sharp, 0.75 / 0.3125, [0.25, 0.0, 0.5]),
        (lambda z: F.cross_entropy(z, y, w), 1 / of_class.square().sum().item(), of_class.tolist()),
        (lambda z: F.cross_entropy(z, soft), (of_soft.sum() / of_soft.square().sum()).item(), of_soft.tolist()),
        (lambda z: F.mse_loss(z, soft), 3.0 * C, [1 / 3 / C] * 3),
        (lambda z: F.mse_loss(z, soft, reduction="sum"), 1.0, [1.0] * 3),
        (lambda z: F.mse_loss(z, soft, reduction="none").mean(1) @ sharp, C * 0.75 / 0.3125, [0.0625, 0.0, 0.125]),
        (lambda z: F.binary_cross_entropy_with_logits(z, soft), 3.0 * C, [1 / 3 / C] * 3),
        (lambda z: -F.cross_entropy(z, y), 1.0, [0.0] * 3),
    ]
    for loss, denominator, omega in table:
        (t,) = read(loss, z)
        assert t.denominator.item() == pytest.approx(denominator)
        assert t.omega.tolist() == pytest.approx(omega)
        assert not t.omega.requires_grad


@pytest.mark.parametrize(("shape", "target"), [((N, C), y), ((N, C, T), y_t), ((N * T, C), y_t.reshape(-1))])
def test_empirical_keeps_positions_apart(shape: tuple[int, ...], target: Tensor) -> None:
    z = point(*shape)
    loss = F.cross_entropy(z, target, ignore_index=2)
    (t,) = read(lambda z: F.cross_entropy(z, target, ignore_index=2), z)
    (gradient,) = torch.autograd.grad(loss, z)
    M = (target != 2).sum()
    split = t.empirical(gradient, N, M.sqrt().expand(N, z.numel() // N // C))
    torch.testing.assert_close(split.sum(0), gradient * M.sqrt())
    each = torch.autograd.functional.jacobian(
        lambda z: F.cross_entropy(z, target, ignore_index=2, reduction="none").reshape(-1), z.detach()
    ).reshape(-1, *shape)  # one gradient a term
    of_terms = each.reshape(N, -1, N, z.numel() // N)
    expected = torch.stack([torch.einsum("tp,tq->pq", of_terms[n, :, n], of_terms[n, :, n]) for n in range(N)]) / M
    torch.testing.assert_close(blocks(split, N), expected)


class Model(nn.Module):
    """Returns its own loss, as Hugging Face models do, from shifted logits."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.linear, self.loss = nn.Linear(2, C), loss

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.linear(x)
        return {"loss": self.loss(logits[:, :-1].reshape(-1, C), labels[:, 1:].reshape(-1)), "logits": logits}


def test_a_model_that_returns_its_loss() -> None:
    model, x, target = Model(nn.CrossEntropyLoss()), uniform(N, T + 1, 2), labels(N, T + 1)
    with LossRecorder() as recorder:
        out = model(x, target)
    (t,) = read_terms(recorder, out["loss"])
    assert t.z.shape == (N * T, C)
    (s,) = torch.autograd.grad(t.z, out["logits"], exact([t], N)[0])
    assert (s[:, -1] == 0).all()
    assert t.columns(N) == T * C


def test_only_what_the_loss_depends_on() -> None:
    z = point(N, C)
    with LossRecorder() as recorder:
        F.cross_entropy(z, 3 - y)  # a metric
        with torch.no_grad():
            F.mse_loss(z, soft)
        F.cross_entropy(z.detach(), y)
        F.l1_loss(z, soft)
        loss = F.cross_entropy(z, y) + z.square().mean()
    assert len(recorder.calls) == 4
    (t,) = read_terms(recorder, loss)
    torch.testing.assert_close(blocks(exact([t], N), N), hessian(lambda z: F.cross_entropy(z, y), z, N), rtol=1e-10, atol=1e-12)
    assert read_terms(recorder, z.square().mean()) == []
    loss.backward()  # the graph was kept
    assert z.grad is not None


def test_the_recorder_leaves_nothing_behind() -> None:
    recorder = LossRecorder()
    with pytest.raises(RuntimeError, match="inside"), recorder:
        raise RuntimeError("inside")
    assert torch.overrides._get_current_function_mode() is None
    F.cross_entropy(point(N, C), y)
    assert recorder.calls == []


def test_recorders_nest() -> None:
    with LossRecorder() as outer, LossRecorder() as inner:
        loss = F.cross_entropy(point(N, C), y)
    assert len(outer.calls) == len(inner.calls) == 1
    assert len(read_terms(outer, loss)) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision(dtype: torch.dtype) -> None:
    z = point(N, C).detach()
    losses = [
        *MC.values(),
        lambda z: F.cross_entropy(z, soft.to(z.dtype)),
        lambda z: F.binary_cross_entropy_with_logits(z, soft.to(z.dtype)),
    ]
    for loss in (losses[0], losses[2], *losses[4:]):
        (t,) = read(lambda z, f=loss: f(z), z.to(dtype).requires_grad_())
        (reference,) = read(loss, z.to(dtype).double().requires_grad_())
        assert t.omega.dtype == torch.float32
        for s in (exact([t], N), t.sample(2, torch.Generator()), t.empirical(t.z.detach(), N, torch.ones(N, 1))):
            assert s.dtype == dtype
        torch.testing.assert_close(exact([t], N).double(), exact([reference], N), rtol=2e-2, atol=2e-2)


def test_a_large_half_precision_mean_does_not_overflow() -> None:
    z = torch.zeros(70_000, 1, dtype=torch.float16, requires_grad=True)
    for loss in (F.mse_loss, F.binary_cross_entropy_with_logits):
        (t,) = read(lambda z, f=loss: f(z, torch.zeros_like(z)), z)
        assert t.denominator.item() == pytest.approx(70_000)
        assert (t.omega > 0).all()


DECLARED: list[tuple[str, object, Loss, tuple[int, ...]]] = [
    ("categorical", Categorical(), lambda z: F.cross_entropy(z, y), (N, C)),
    ("categorical", Categorical(), lambda z: F.cross_entropy(z, y_t), (N, C, T)),
    ("gaussian", Gaussian(), lambda z: F.mse_loss(z, uniform(N, C)), (N, C)),
    ("gaussian", Gaussian(), lambda z: F.mse_loss(z, uniform(N)), (N,)),
    ("bernoulli", Bernoulli(), lambda z: F.binary_cross_entropy_with_logits(z, uniform(N, T, C)), (N, T, C)),
]


@pytest.mark.parametrize(("name", "likelihood", "loss", "shape"), DECLARED)
def test_declared_likelihoods(name: str, likelihood: Categorical, loss: Loss, shape: tuple[int, ...]) -> None:
    z = point(*shape)
    H = hessian(loss, z, N)
    assert type(find_likelihood(name)) is type(likelihood) is LIKELIHOODS[name]
    torch.testing.assert_close(blocks(exact([likelihood.terms(z)], N), N), H)
    torch.testing.assert_close(blocks(exact([likelihood.terms(z, factor=0.3)], N), N), 0.3 * H)
    (gradient,) = torch.autograd.grad(loss(z), z)
    (seen,) = read(loss, z)
    for t in (terms_from_gradient(name, z, gradient), terms_from_gradient(likelihood, z, gradient)):
        torch.testing.assert_close(exact([t], N), exact([seen], N))
        torch.testing.assert_close(t.denominator, seen.denominator)
    total = type(likelihood)(reduction="sum").terms(z)
    assert total.denominator == 1
    torch.testing.assert_close(blocks(exact([total], N), N), H * seen.denominator)


def test_declared_masks_and_layouts() -> None:
    z = point(N, T, C)
    target = y_t.masked_fill(y_t == 2, -100)
    flat = lambda z: F.cross_entropy(z.reshape(-1, C), target.reshape(-1))  # noqa: E731
    (gradient,) = torch.autograd.grad(flat(z), z)
    H = hessian(flat, z, N)
    declared = Categorical(axis=-1)
    torch.testing.assert_close(blocks(exact([declared.terms(z, valid=target >= 0)], N), N), H)
    torch.testing.assert_close(blocks(exact([terms_from_gradient(declared, z, gradient)], N), N), H)
    halved = declared.terms(z, factor=torch.full((N, T), 0.5), valid=target >= 0)
    torch.testing.assert_close(blocks(exact([halved], N), N), 0.5 * H)


ERRORS: list[tuple[Callable[[], object], str]] = [
    (lambda: find_likelihood("poisson"), "likelihood='poisson': expected categorical, gaussian, bernoulli"),
    (lambda: Gaussian(reduction="none"), "reduction='none': expected mean, sum"),
    (lambda: Categorical().terms(point(N, C)).columns(2), r"3 loss terms.*\(3, 4\).*2 examples"),
    (lambda: list(Categorical().terms(point(N, C)).exact(0)), "0 examples"),
    (lambda: list(Categorical().terms(point(N, C)).exact(N, chunk=0)), "chunk=0"),
    (lambda: Categorical().terms(point(N, C)).sample(0, torch.Generator()), "samples=0"),
    (lambda: Categorical().terms(point(N, C), valid=torch.ones(2)), "2 elements.*3 terms"),
    (lambda: Categorical(axis=2).terms(point(N, C)), "no class axis 2"),
]


@pytest.mark.parametrize(("act", "message"), ERRORS)
def test_errors_say_what_was_given(act: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        act()
