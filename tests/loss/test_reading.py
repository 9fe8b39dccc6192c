"""Weights of loss terms from dL/dz alone: what is right is read to rounding, what is wrong is told apart."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradmaker.loss.likelihood import Bernoulli, Categorical, Likelihood
from gradmaker.loss.reading import candidates, fit, name_of, named

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
LAST = Categorical(axis=-1)
ACCURACY = {F64: 1e-13, F32: 2e-6, BF16: 4e-3, F16: 1e-3}
Loss = Callable[[Tensor], Tensor]


def gradient(loss: Loss, z: Tensor) -> Tensor:
    z = z.detach().requires_grad_()
    return torch.autograd.grad(loss(z), z)[0]


def logits(*shape: int, scale: float = 2.0, dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
    return (torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def wide(z: Tensor) -> Tensor:
    return z.to(torch.promote_types(z.dtype, F32))


def proven(z: Tensor, g: Tensor) -> list[Likelihood]:
    return [one for one in candidates(z) if fit(one, z, g).proves]


# --- weights --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scale", [0.1, 2.0, 10.0])
@pytest.mark.parametrize("C", [3, 10, 1000])
@pytest.mark.parametrize("dtype", ACCURACY)
def test_weights_of_single_terms(dtype: torch.dtype, C: int, scale: float) -> None:
    """Masked, of either sign, and of any size: an example's own weight over a count of tokens."""
    z = logits(40, C, scale=scale, dtype=dtype)
    t = torch.randint(C, (40,), generator=torch.Generator().manual_seed(1))
    t[::7] = -100
    w = torch.linspace(-1 if dtype != F16 else 0.1, 2, 40, dtype=F64).to(wide(z).dtype)
    found = fit(LAST, z, gradient(lambda z: (F.cross_entropy(wide(z), t, reduction="none") * w).sum() / 7, z))
    expected = torch.where(t >= 0, w, 0).double() / 7
    clear = z.float().softmax(-1).amax(-1) < 0.999  # in half precision others have rounded away
    error = (found.weighting.weight - expected)[clear].abs() / expected[clear].abs().clamp(min=1e-3)
    assert found.fits and (found.proves or (dtype == BF16 and scale == 0.1))
    assert error.max() <= ACCURACY[dtype]
    assert torch.equal(found.weighting.weight == 0, t < 0) or dtype == F16


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_a_vocabulary(dtype: torch.dtype) -> None:
    z = logits(6, 4, 50257, dtype=dtype)
    t = torch.randint(50257, (6, 4), generator=torch.Generator().manual_seed(1))
    t[2:, 3] = -100
    g = gradient(lambda z: F.cross_entropy(wide(z).reshape(-1, 50257), t.reshape(-1)), z)
    found = fit(LAST, z, g)
    assert found.proves and found.weighting.weight.shape == t.shape
    torch.testing.assert_close(found.weighting.weight, (t >= 0).double() / 20, rtol=ACCURACY[dtype], atol=0)


@pytest.mark.parametrize("shape", [(12, 3), (12, 2), (5, 3, 4), (5, 4, 3), (2, 3, 4, 5), (7,)])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_class_axis(weighted: bool, shape: tuple[int, ...]) -> None:
    C = shape[1] if len(shape) > 1 else shape[0]
    z, axis = logits(*shape), min(1, len(shape) - 1)
    places = (*shape[:axis], *shape[axis + 1 :])
    t = torch.randint(C, places, generator=torch.Generator().manual_seed(1))
    w = torch.linspace(0.5, 2, C, dtype=F64) if weighted else None
    found = [one for one in proven(z, gradient(lambda z: F.cross_entropy(z, t, weight=w), z)) if isinstance(one, Categorical)]
    assert [one.axis_of(z) for one in found] == [axis]
    weight = fit(found[0], z, gradient(lambda z: F.cross_entropy(z, t, weight=w, reduction="sum"), z)).weighting.weight
    torch.testing.assert_close(weight, (torch.ones(C, dtype=F64) if w is None else w)[t], rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("shape", [(40,), (40, 1), (16, 5), (4, 3, 6, 6)])
@pytest.mark.parametrize("weighted", ["no", "positive", "by label"])
def test_binary_weights(weighted: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    z = logits(*shape, dtype=dtype)
    y = (torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.4).to(dtype)
    size = (shape[1], *[1] * (len(shape) - 2)) if len(shape) > 1 else (1,)
    w = {"no": None, "positive": torch.tensor(3.0), "by label": torch.linspace(0.5, 2, size[0]).reshape(size)}[weighted]
    g = gradient(lambda z: F.binary_cross_entropy_with_logits(z, y, pos_weight=None if w is None else w.to(dtype)), z)
    assert proven(z, g) == [Bernoulli()]
    expected = (1 + (1.0 if w is None else w.to(dtype)) * y - y).double() / z.numel()
    found = fit(Bernoulli(), z, g)
    torch.testing.assert_close(found.weighting.weight, expected, rtol=1e-12 if dtype == F64 else 2e-6, atol=0)


def test_log_probabilities() -> None:
    z, t = logits(12, 4).log_softmax(-1), torch.arange(12) % 4
    g = gradient(lambda z: F.nll_loss(z, t), z)
    assert LAST in proven(z, g)
    torch.testing.assert_close(fit(LAST, z, g).weighting.weight, torch.full((12,), 1 / 12, dtype=F64))
    q = logits(12, 4, seed=1).softmax(-1)
    assert not proven(z, gradient(lambda z: -(q * z).sum(-1).mean(), z))


# --- gradients that have rounded away -------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_terms_that_have_rounded_away_count_and_masked_ones_do_not(dtype: torch.dtype) -> None:
    z = torch.zeros(6, 3, dtype=F64)
    z[:, 0] = torch.tensor([1.0, 2.0, 200.0, 0.5, 12.0, 1.5])
    z[:, 1] = torch.tensor([0.3, 0.1, 0.2, -0.4, 0.2, 0.7])
    t = torch.tensor([0, 1, 0, -100, 0, -100])
    z = z.to(dtype)
    g = gradient(lambda z: F.cross_entropy(wide(z), t, reduction="sum"), z)
    assert not g[2].any() and not g[3].any()
    found = fit(LAST, z, g)
    assert found.proves and found.clear < 4
    torch.testing.assert_close(found.weighting.weight, (t >= 0).double(), rtol=ACCURACY[dtype], atol=0)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("likelihood", [LAST, Bernoulli()], ids=["categorical", "bernoulli"])
def test_fitted_models_leave_it_open_or_are_read(likelihood: Likelihood, dtype: torch.dtype) -> None:
    for scale in (1.0, 5.0, 20.0, 60.0, 100.0, 1e3, 1e4):
        z = logits(64, 5, scale=scale, dtype=dtype)
        t = z.argmax(-1)
        loss: dict[str, Loss] = {
            "Categorical": lambda z, t=t: F.cross_entropy(wide(z), t),  # type: ignore[misc]
            "Bernoulli": lambda z: F.binary_cross_entropy_with_logits(wide(z), (z.detach() > 0).to(wide(z))),
        }
        g = gradient(loss[type(likelihood).__name__], z)
        for rows in (slice(0, 64), slice(3, 5), slice(7, 8)):
            found = fit(likelihood, z[rows], g[rows], known=True)
            assert found.fits or not found.clear
            assert bool(found.weighting.weight.isfinite().all())


@pytest.mark.parametrize("offset", [1e3, 1e4, -1e5])
@pytest.mark.parametrize("C", [2, 5])
def test_large_logits(C: int, offset: float) -> None:
    """`logsumexp` rounds to the size of the logits."""
    z, t = logits(32, C, dtype=F32) + offset, torch.arange(32) % C
    found = fit(LAST, z, gradient(lambda z: (z.logsumexp(-1) - z.gather(1, t[:, None]).squeeze(1)).mean(), z), known=True)
    assert (found.clear > 0) == (offset == 1e3)
    if found.clear:
        assert found.fits
        torch.testing.assert_close(found.weighting.weight, torch.full((32,), 1 / 32, dtype=F64), rtol=3e-4, atol=0)


@pytest.mark.parametrize("dtype", [F64, F32])
def test_elements_of_a_binary_loss_that_are_masked_or_have_rounded_away(dtype: torch.dtype) -> None:
    z = logits(16, 5, dtype=dtype)
    y, mask = (z > 0.3).to(dtype), torch.arange(80).reshape(16, 5) % 3 != 0
    z[mask & (torch.arange(80).reshape(16, 5) % 5 == 1)] = 200.0  # labels 1 that are certain
    y[z == 200] = 1.0
    g = gradient(lambda z: F.binary_cross_entropy_with_logits(z, y, mask.to(dtype), reduction="sum"), z)
    found = fit(Bernoulli(), z, g)
    assert found.proves and not g[z == 200].any() and (z == 200).any()
    torch.testing.assert_close(found.weighting.weight, mask.double(), rtol=1e-6, atol=0)


def test_masked_rows_may_hold_anything() -> None:
    z, t = logits(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    g = gradient(lambda z: F.cross_entropy(z[:4], t[:4]), z)
    z[4], z[5] = float("nan"), float("inf")
    expected = torch.tensor([0.25] * 4 + [0.0] * 2, dtype=F64)
    found = fit(LAST, z, g)
    assert found.proves
    torch.testing.assert_close(found.weighting.weight, expected)


# --- other losses ---------------------------------------------------------------------------------------------------------
def wrong_losses(C: int) -> dict[str, Callable[[Tensor], Tensor]]:
    t = torch.randint(C, (64,), generator=torch.Generator().manual_seed(1))
    hot = F.one_hot(t, C).double()
    q = logits(64, C, scale=1.0, seed=2).softmax(-1)

    def ce(z: Tensor, **options: Any) -> Tensor:
        return F.cross_entropy(z, t, **options)

    return {
        "smoothing": partial(ce, label_smoothing=0.1),
        "soft labels": lambda z: F.cross_entropy(z, q.to(z)),
        "mixed labels": lambda z: 0.7 * ce(z) + 0.3 * F.cross_entropy(z, t.roll(1)),
        "cross entropy and KL": lambda z: ce(z) + F.kl_div(z.log_softmax(-1), q.to(z), reduction="batchmean"),
        "temperature": lambda z: ce(z / 1.5),
        "arc margin": lambda z: ce(z - 0.5 * hot.to(z) * z),
        "z-loss": lambda z: ce(z) + 1e-2 * z.logsumexp(-1).square().mean(),
        "entropy": lambda z: ce(z) - 0.05 * torch.special.entr(z.softmax(-1)).sum(-1).mean(),
        "squares": lambda z: F.mse_loss(z, hot.to(z)),
        "Huber": lambda z: F.huber_loss(z, hot.to(z)),
        "hinge": lambda z: (1 - (2 * hot.to(z) - 1) * z).clamp(min=0).mean(),
        "Poisson": lambda z: F.poisson_nll_loss(z, hot.to(z)),
        "probabilities": lambda z: (z.softmax(-1) - hot.to(z)).square().mean(),
        "one entry": lambda z: F.huber_loss(z.gather(1, t[:, None]), torch.ones(64, 1).to(z)),
        "probabilities taken as logits": lambda z: -z.gather(1, t[:, None]).mean(),
        "largest logit": lambda z: -z.amax(-1).mean(),
        "penalty": lambda z: ce(z) + 1e-2 * z.square().mean(),
        "soft binary labels": lambda z: F.binary_cross_entropy_with_logits(z, (0.1 + 0.8 * hot).to(z)),
        "focal binary": lambda z: ((z.sigmoid() - hot.to(z)).square() * F.softplus((1 - 2 * hot.to(z)) * z)).mean(),
        "binary of examples": lambda z: (F.binary_cross_entropy_with_logits(z, hot.to(z), reduction="none").sum(1) * w).mean(),
    }


w = torch.linspace(0.5, 2, 64, dtype=F32)


@pytest.mark.parametrize("name", wrong_losses(3))
@pytest.mark.parametrize("C", [2, 3, 10, 300])
@pytest.mark.parametrize("dtype", [F64, F32])
def test_wrong_losses_are_told_apart(dtype: torch.dtype, C: int, name: str) -> None:
    for scale in (0.5, 2.0):
        z = logits(64, C, scale=scale, dtype=dtype)
        found = [fit(one, z, gradient(wrong_losses(C)[name], z)) for one in candidates(z)]
        assert not any(f.fits for f in found)
        assert min(f.residual for f in found) > 3 * found[0].tolerance


@pytest.mark.parametrize("name", ["soft labels", "mixed labels", "temperature", "squares", "Huber", "hinge", "Poisson"])
def test_wrong_losses_in_bfloat16(name: str) -> None:
    z = logits(64, 10, dtype=BF16)
    assert not proven(z, gradient(lambda z: wrong_losses(10)[name](z.float()), z))


@pytest.mark.parametrize("C", [2, 3, 10])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equal_logits_prove_nothing(smoothing: float, C: int) -> None:
    for scale in (0.0, 1e-9):
        z = logits(12, C, scale=scale, dtype=F32) + 0.3
        g = gradient(lambda z: F.cross_entropy(z, torch.arange(12) % C, label_smoothing=smoothing), z)
        found = [fit(one, z, g) for one in candidates(z)]
        assert not any(f.proves for f in found) and found[0].fits


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("scale", [1e-3, 0.02, 0.3])
def test_a_slight_smoothing_is_proven_or_left_open(scale: float, dtype: torch.dtype) -> None:
    """Near equal logits a smoothing of one percent is either seen, or no cross entropy of hard labels is proven."""
    for C in (3, 10, 300):
        z = logits(64, C, scale=scale, dtype=dtype)
        loss = partial(F.cross_entropy, target=torch.arange(64) % C)
        assert not proven(z, gradient(partial(loss, label_smoothing=0.01), z))
        assert LAST in proven(z, gradient(loss, z))


def test_the_weights_of_a_focal_loss_are_a_function_of_probabilities() -> None:
    z, t = logits(64, 10, dtype=F32), torch.arange(64) % 10

    def focal(z: Tensor) -> Tensor:
        each = F.cross_entropy(z, t, reduction="none")
        return ((1 - (-each).exp()).square() * each).mean()

    def margin(z: Tensor) -> Tensor:
        return F.cross_entropy(z - 0.5 * F.one_hot(t, 10), t)

    assert fit(LAST, z, gradient(focal, z)).ordered and fit(LAST, z, gradient(margin, z)).ordered
    for weights in (torch.ones(64), torch.rand(64, generator=torch.Generator().manual_seed(0))):
        found = fit(LAST, z, gradient(lambda z, a=weights: (F.cross_entropy(z, t, reduction="none") * a).mean(), z))  # type: ignore[misc]
        assert found.proves and not found.ordered


def test_names() -> None:
    for likelihood in (None, Bernoulli(), LAST, Categorical(axis=1)):
        assert named(name_of(likelihood)) == likelihood
    with pytest.raises(ValueError, match="likelihood='gaussian': expected one of '', 'bernoulli', 'categorical -1'"):
        named("gaussian")
