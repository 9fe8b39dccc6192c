"""Terms of a whole loss by autograd, against dense Hessians of the loss in its outputs or in the logits before them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradmaker.errors import SelfCheckError
from gradmaker.loss.autograd_terms import WIDEST, AutogradTerms, Output, autograd_terms
from gradmaker.loss.likelihood import read_terms
from gradmaker.loss.recorder import LossRecorder
from gradmaker.loss.terms import CategoricalTerms, GaussianTerms, Terms

pytestmark = pytest.mark.usefixtures("double")

N, C, T = 3, 4, 2
Loss = Callable[[Tensor], Tensor]


def numbers(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def point(*shape: int) -> Tensor:
    return numbers(*shape).requires_grad_()


def labels(*shape: int) -> Tensor:
    return torch.randint(C, shape, generator=torch.Generator().manual_seed(3))


y, y_t = labels(N), labels(N, T)
q = numbers(N, C, seed=4).softmax(1)


def formed(loss: Loss, *zs: Tensor, examples: int = N, axes: tuple[int, ...] | None = None) -> list[Terms]:
    outputs = [Output(z, axes or (z.ndim - 1, min(1, z.ndim - 1))) for z in zs]
    generator, M = torch.Generator().manual_seed(0), torch.tensor(1.0, dtype=torch.float64)
    return autograd_terms(loss(*zs), outputs, examples, M, generator)[0]


def dense(loss: Loss, z: Tensor) -> Tensor:
    H: Any = torch.func.jacrev(torch.func.grad(lambda flat: loss(flat.view_as(z))))(z.detach().reshape(-1))
    return H


def columns(terms: Terms, examples: int) -> Tensor:
    """``sum_k s_k s_k^T``, examples apart, as one matrix.  # (P, P)"""
    P = terms.z.numel()
    total = torch.zeros(P, P)
    for s in terms.exact(examples):
        parts = s.reshape(len(s), examples, -1)
        outer = torch.einsum("knp,knq->npq", parts, parts)
        total += torch.block_diag(*outer)
    return total


LOSSES: dict[str, tuple[Loss, tuple[int, ...], type[Terms]]] = {
    "penalty": (lambda z: F.cross_entropy(z, y) + 0.1 * z.square().mean(), (N, C), AutogradTerms),
    "penalty of the normaliser": (
        lambda z: F.cross_entropy(z, y) + 0.1 * z.logsumexp(1).square().mean(),
        (N, C),
        AutogradTerms,
    ),
    "power": (lambda z: F.cross_entropy(z, y, reduction="none").square().mean(), (N, C), AutogradTerms),
    "class axis 1": (lambda z: F.cross_entropy(z, y_t) + 0.1 * z.square().sum(), (N, C, T), AutogradTerms),
    "class axis last": (lambda z: -z.log_softmax(-1)[..., 0].mean(), (N, T, C), AutogradTerms),
    "one example counts": (lambda z: z[1].logsumexp(0), (N, C), AutogradTerms),
    "positions coupled": (lambda z: z.flatten(1).logsumexp(1).sum(), (N, T, C), AutogradTerms),
    "huber": (lambda z: F.huber_loss(z, numbers(N, C, seed=9), delta=0.7), (N, C), GaussianTerms),
    "poisson": (lambda z: F.poisson_nll_loss(z, numbers(N, seed=8).exp()), (N,), GaussianTerms),
    "wide and diagonal": (lambda z: z.exp().mean(), (N, WIDEST + 1), GaussianTerms),
    "a number": (lambda z: z.square() / 3, (), GaussianTerms),
}


@pytest.mark.parametrize("name", LOSSES)
def test_columns_and_products_are_the_hessian(name: str) -> None:
    loss, shape, kind = LOSSES[name]
    z = point(*shape)
    n = N if shape else 1
    (terms,) = formed(loss, z, examples=n)
    assert isinstance(terms, kind)
    H = dense(loss, z)
    torch.testing.assert_close(columns(terms, n), H, rtol=1e-10, atol=1e-12)
    u, v = numbers(*shape, seed=1), numbers(*shape, seed=2)
    torch.testing.assert_close(terms.multiply(u).reshape(-1), H @ u.reshape(-1), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(terms.inner(u, v), u.reshape(-1) @ H @ v.reshape(-1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["penalty", "class axis 1", "positions coupled"])
def test_samples_have_the_hessian_as_their_moment(name: str) -> None:
    loss, shape, _ = LOSSES[name]
    (terms,) = formed(loss, z := point(*shape))
    count = 20000
    s = terms.sample(count, torch.Generator().manual_seed(1)).reshape(count, -1)
    H = dense(loss, z)
    deviation = ((H.diagonal().outer(H.diagonal()) + H.square()) / count).sqrt()
    assert bool(((s.mT @ s - H).abs() <= 5 * deviation + 1e-12).all())


@pytest.mark.parametrize("examples", [1, 2])
def test_a_batch_that_depends_on_itself_is_one_block(examples: int) -> None:
    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z @ numbers(4, 3), torch.arange(4) % 3) + z.mean(0).square().sum()

    z = point(4, 4)
    (terms,) = formed(loss, z, examples=examples)
    assert terms.omega.numel() == 1
    torch.testing.assert_close(columns(terms, 1), dense(loss, z), rtol=1e-10, atol=1e-12)


def test_classes_that_couple_the_batch_are_one_block() -> None:
    """Blocks along the first axis would be small, and belong to no example."""
    z = point(4, 4)
    (terms,) = formed(lambda z: z.logsumexp(0).sum(), z, examples=4)
    assert terms.omega.numel() == 1
    torch.testing.assert_close(columns(terms, 1), dense(lambda z: z.logsumexp(0).sum(), z), rtol=1e-10, atol=1e-12)


def test_a_vector_holds_examples_one_after_the_other() -> None:
    z = point(2 * N)
    (terms,) = formed(lambda z: z.view(N, 2).logsumexp(1).sum(), z)
    assert terms.omega.numel() == N
    assert torch.equal(terms.owners(N), torch.arange(N).repeat_interleave(2))
    torch.testing.assert_close(columns(terms, N), dense(lambda z: z.view(N, 2).logsumexp(1).sum(), z), rtol=1e-10, atol=1e-12)


LOGS: dict[str, Loss] = {
    "by hand": lambda x: -x[torch.arange(N), y].mean(),
    "smoothed by hand": lambda x: -(q * x).sum(1).mean(),
    "focal": lambda x: -((1 - x.exp()) ** 2 * x)[torch.arange(N), y].mean(),
    "entropy": lambda x: F.nll_loss(x, y) - 0.05 * (x.exp() * -x).sum(1).mean(),
    "exponential": lambda x: F.nll_loss(x, y).exp(),
}


@pytest.mark.parametrize("name", LOGS)
def test_log_probabilities_have_the_hessian_of_their_logits(name: str) -> None:
    logits = (0.3 * numbers(N, C)).requires_grad_()
    z = logits.log_softmax(1)
    if name == "exponential":
        logits, z = logits[:1], z[:1]
        loss: Loss = lambda x: F.nll_loss(x, y[:1]).exp()  # noqa: E731
    else:
        loss = LOGS[name]
    n = len(z)
    (terms,) = formed(loss, z, examples=n)
    assert isinstance(terms, CategoricalTerms) == name.endswith("hand")
    J = torch.func.jacrev(lambda flat: flat.view(n, C).log_softmax(1).reshape(-1))(logits.detach().reshape(-1))
    H = dense(lambda x: loss(x.log_softmax(1)), logits)
    torch.testing.assert_close(J.mT @ columns(terms, n) @ J, H, rtol=1e-9, atol=1e-12)


def test_two_outputs_have_terms_of_their_own() -> None:
    a, b = point(N, C), numbers(N, T, seed=6).requires_grad_()

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return F.cross_entropy(a, y).square() + F.huber_loss(b, torch.zeros(N, T))

    first, second = formed(loss, a, b)
    torch.testing.assert_close(columns(first, 1), dense(lambda a: loss(a, b.detach()), a), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(columns(second, 1), dense(lambda b: loss(a.detach(), b), b), rtol=1e-10, atol=1e-12)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.square().sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g * ctx.saved_tensors[0]


REFUSED: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]], str]] = {
    "not convex": (lambda z: z.cos().sum(), [(N, C)], "not convex"),
    "not convex rows": (lambda z: -F.cross_entropy(z, y), [(N, C)], "not convex"),
    "too wide": (lambda z: z.logsumexp(1).sum(), [(2, WIDEST + 1)], str(WIDEST)),
    "outputs that depend on each other": (lambda a, b: (a * b).exp().sum(), [(N, C), (N, C)], "couples outputs"),
    "once": (lambda z: Once.apply(z), [(N, C)], "only once"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_formed_is_refused(name: str) -> None:
    loss, shapes, words = REFUSED[name]
    zs = [numbers(*shape, seed=j).requires_grad_() for j, shape in enumerate(shapes)]
    with pytest.raises(SelfCheckError, match=words):
        formed(loss, *zs, examples=shapes[0][0])


def test_a_little_that_is_not_convex_is_clipped() -> None:
    z = numbers(N, C).requires_grad_()
    scale = torch.ones(N, C)
    scale[0, 0] = -5e-4
    (terms,) = formed(lambda z: (scale * z.square()).sum(), z)
    torch.testing.assert_close(columns(terms, N), torch.diag(2 * scale.clamp(min=0).reshape(-1)))


DIVERGENCES: dict[str, Loss] = {
    f"{reduction}{', log target' * log}{', weighted' * weighted}": lambda x, r=reduction, log=log, w=weighted: (
        F.kl_div(x, (w * q.sum(1, keepdim=True) + q).log() if log else w * q + q, reduction=r, log_target=log) * (0.3, 1)[w]
    )
    for reduction in ("mean", "sum", "batchmean")
    for log in (False, True)
    for weighted in (0, 1)
}
DIVERGENCES["none"] = lambda x: (F.kl_div(x, q, reduction="none").sum(1) * torch.arange(N)).mean()
DIVERGENCES["classes weighted"] = lambda x: (F.kl_div(x, q, reduction="none") * torch.arange(C)).mean()


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_are_categorical(name: str) -> None:
    loss, logits = DIVERGENCES[name], point(N, C)
    with LossRecorder() as recorder:
        value = loss(logits.log_softmax(1))
    (terms,) = read_terms(recorder, value)
    J = torch.func.jacrev(lambda flat: flat.view(N, C).log_softmax(1).reshape(-1))(logits.detach().reshape(-1))
    H = dense(lambda z: loss(z.log_softmax(1)), logits)
    torch.testing.assert_close(J.mT @ columns(terms, N) @ J, H, rtol=1e-10, atol=1e-12)


def test_a_divergence_finds_its_classes() -> None:
    logits = point(N, C, T)
    target = numbers(N, C, T, seed=2).softmax(1)
    with LossRecorder() as recorder:
        value = F.kl_div(logits.log_softmax(1), target, reduction="batchmean")
    (terms,) = read_terms(recorder, value)
    assert terms.axis == 1
    J = torch.func.jacrev(lambda flat: flat.view(N, C, T).log_softmax(1).reshape(-1))(logits.detach().reshape(-1))
    H = dense(lambda z: F.kl_div(z.log_softmax(1), target, reduction="batchmean"), logits)
    torch.testing.assert_close(J.mT @ columns(terms, N) @ J, H, rtol=1e-10, atol=1e-12)
