"""Weights of loss terms, read from the logits and the gradient of a loss that is not recorded.

A cross entropy with hard labels has ``dL/dz_m = omega_m (p_m - e_y)``: ``omega_m`` is the slope of the gradient on ``p_m`` over
the classes other than the label, by least squares, and what is left proves that the loss is one. For two classes, and for a
binary cross entropy with hard labels, ``omega (sigma - y)``, one number gives one weight, and nothing is left: there the proof
is that all weights of a label agree. Weights hold the reduction, masks, class weights, ``pos_weight``, and every factor of the
loss. A fit proves something only where other losses would differ: smoothed labels and a temperature do not at equal logits.

Letters: ``m`` terms, ``C`` classes, ``g`` = dL/dz, ``p`` = softmax(z), ``y`` labels, ``omega`` weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from gradmaker.loss.likelihood import Bernoulli, Categorical, Likelihood
from gradmaker.loss.recorder import Weighting, compute, log_axis
from gradmaker.loss.terms import rows_of

__all__ = ["Fit", "candidates", "fit", "name_of", "named"]

PIECE = 1 << 22
"""Entries of the logits that are fitted at once: a bound on memory."""
LARGEST = 1 << 26
"""Most entries of logits that a binary loss is looked for in: they are fitted at once."""
TOLERANCES = {torch.float64: 1e-7, torch.float32: 3e-4}
"""Largest relative residual of a fit, and largest relative rounding error of a weight that is read; else 5e-2."""
RATIOS = {torch.float64: 1e-3, torch.float32: 3e-3}
"""Largest ratio of the residual of a proof to what a constant in every class would leave, as by smoothing; else 5e-2."""

ORDERED = 32
"""Fewest terms whose weights may be found to be a function of the probabilities of their labels, as of a focal loss."""


@dataclass(frozen=True)
class Fit:
    """A fit of a likelihood to logits and a gradient."""

    likelihood: Likelihood
    weighting: Weighting  # with the weights that were read; a sum, so that these are dL/dl
    clear: int  # number of terms whose gradient has not rounded away
    residual: float  # relative
    contrast: float  # what a constant in every class would leave
    tolerance: float
    ratio: float
    rounding: float
    ordered: bool = False  # whether the weights are a function of the probabilities of the labels, as in a focal loss

    @property
    def fits(self) -> bool:
        """Whether the loss may be that of this likelihood, with hard labels."""
        return self.clear > 0 and self.residual <= self.tolerance

    @property
    def proves(self) -> bool:
        """Whether it is: other losses would not fit these logits."""
        return self.fits and max(self.residual, 2 * self.rounding) <= self.ratio * self.contrast


def candidates(z: Tensor) -> list[Likelihood]:
    """Likelihoods that logits of this shape may have: classes on the last axis or on axis 1, or independent elements."""
    axes = [-1] * (z.ndim > 0) + [1] * (z.ndim > 2)
    binary = [Bernoulli()] if z.numel() <= LARGEST else []
    return [*(Categorical(axis=axis) for axis in axes if z.shape[axis] > 1), *binary]


def name_of(likelihood: Likelihood | None) -> str:
    """The name of a likelihood that was read, for a saved state: ``categorical -1``, ``bernoulli``, or nothing."""
    if likelihood is None:
        return ""
    return f"categorical {likelihood.axis}" if isinstance(likelihood, Categorical) else "bernoulli"


def named(name: str) -> Likelihood | None:
    """The likelihood of a name of `name_of`. ValueError for another name."""
    known = {name_of(one): one for one in (None, Bernoulli(), Categorical(axis=-1), Categorical(axis=1))}
    if name not in known:
        raise ValueError(f"likelihood={name!r}: expected one of {', '.join(map(repr, known))}")
    return known[name]


@torch.no_grad()
def fit(likelihood: Likelihood, z: Tensor, gradient: Tensor, known: bool = False) -> Fit:
    """Fit the loss of a likelihood to its gradient.  gradient: dL/dz, like z. known: whether it is proven already"""
    number = _Number.of(gradient.dtype)
    if isinstance(likelihood, Categorical):
        return _categorical(likelihood, z, gradient, number)
    return _bernoulli(likelihood, z, gradient, number, known)


@dataclass(frozen=True)
class _Number:
    """Rounding of a dtype."""

    rounding: float  # relative
    own: float  # of the computation, in float32 or better
    smallest: float
    tolerance: float
    ratio: float

    @classmethod
    def of(cls, dtype: torch.dtype) -> _Number:
        info, wide = torch.finfo(dtype), torch.finfo(torch.promote_types(dtype, torch.float32))
        tolerance, ratio = TOLERANCES.get(dtype, 5e-2), RATIOS.get(dtype, 5e-2)
        return cls(info.eps / 2, wide.eps / 2, info.tiny * info.eps, tolerance, ratio)

    def made(
        self,
        likelihood: Likelihood,
        weighting: Weighting,
        clear: Tensor,
        residual: float,
        contrast: float,
        ordered: bool = False,
    ) -> Fit:
        count = int(clear.sum())
        return Fit(likelihood, weighting, count, residual, contrast, self.tolerance, self.ratio, self.rounding, ordered)


# -------------------------------------------------------------------- softmax
@dataclass(frozen=True)
class _Rows:
    """The fit of each term, on the hypothesis of a weight of one sign.  # (m,) each, in float64"""

    omega: Tensor
    label: Tensor
    largest: Tensor  # log of the largest probability of another class
    missed: Tensor  # probability of all other classes
    error: Tensor  # relative rounding error of omega; inf where the gradient is zero
    size: Tensor  # sum of the squares of the gradient, in the other classes
    rest: Tensor  # the same of what the fit leaves
    slack: Tensor  # the same of what a constant leaves, times the slope
    whole: Tensor  # square of the gradient in the label
    wrong: Tensor  # square of its error, beyond rounding
    against: Tensor  # share of the gradient in the other classes that has the wrong sign

    def __getitem__(self, rows: Tensor) -> _Rows:
        return _Rows(*(getattr(self, f.name)[rows] for f in fields(self)))

    def replaced(self, rows: Tensor, by: _Rows) -> _Rows:
        """The same with other rows in the place of some.  rows: indices"""
        return _Rows(*(getattr(self, f.name).index_copy(0, rows, getattr(by, f.name)) for f in fields(self)))

    @property
    def misfit(self) -> Tensor:
        """The largest relative residual of each term, more than 1 if any sign is wrong: signs do not round.  # (m,)"""
        safe = [torch.where(x > 0, x, 1.0) for x in (self.size, self.whole)]
        largest = torch.stack([(self.rest / safe[0]).sqrt(), (self.wrong / safe[1]).sqrt(), self.against]).amax(0)
        return largest + (self.against > 0)


def _categorical(likelihood: Categorical, z: Tensor, gradient: Tensor, number: _Number) -> Fit:
    axis = likelihood.axis_of(z)
    rows, g = rows_of(z, axis), rows_of(gradient, axis)
    normalised = log_axis(z, [axis]) is not None  # log-probabilities, as before `F.nll_loss`
    size = max(1, PIECE // rows.shape[1])
    parts = [_fit_rows(*part, normalised, number) for part in zip(rows.split(size), g.split(size), strict=True)]
    found = _Rows(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(_Rows)))
    clear = found.error <= number.tolerance
    kept = found[clear]
    group, equal = _shared(found, clear, number)
    like = _like(found.omega, clear, group, rows.shape[1])
    unseen = (like.abs() * found.largest.exp() < number.smallest) | (found.size + found.whole > 0)
    omega = torch.where(clear & (not equal), found.omega, torch.where(unseen, like, 0.0))
    if rows.shape[1] == 2:
        residual, contrast = _agreement(kept.omega, kept.label, kept.largest.exp())
    else:
        residual, contrast = (_ratio(x, kept.size) for x in (kept.rest, kept.slack))
    residual = max(residual, _ratio(kept.wrong, kept.whole), _ratio(kept.against * kept.size, kept.size, root=False))
    shape = z.movedim(axis, -1).shape[:-1]
    one = omega.new_ones(())
    weighting = Weighting("categorical", z, omega.reshape(shape), one, "sum", axis)
    return number.made(likelihood, weighting, clear, residual, contrast, _ordered(kept, number))


def _shared(rows: _Rows, clear: Tensor, number: _Number) -> tuple[Tensor, bool]:
    """Groups of terms, all or those of a label, and whether their weights differ by rounding alone: then a mean is better."""
    for group in (torch.zeros_like(rows.label), rows.label):
        if _agreement(rows.omega[clear], group[clear], clear[clear].double())[0] <= 4 * number.rounding:
            return group, True
    return rows.label, False


def _ordered(rows: _Rows, number: _Number) -> bool:
    """Whether weights are a function of the probabilities of the labels, with a turn or two: neighbours have near ranks."""
    n = len(rows.omega)
    ranked = rows.omega.sort().values
    distinct = ranked.diff() > 64 * number.rounding * ranked.abs().amax() if n else ranked
    if n < ORDERED or 2 * int(distinct.sum()) < n:
        return False
    rank = rows.omega[rows.missed.argsort()].argsort().argsort()
    return int(rank.diff().abs().sum()) <= 3 * n


def _ratio(part: Tensor, whole: Tensor, root: bool = True) -> float:
    total = float(whole.sum())
    found = float(part.sum()) / total if total > 0 else 0.0
    return math.sqrt(found) if root else found


def _fit_rows(z: Tensor, g: Tensor, normalised: bool, number: _Number) -> _Rows:
    """Fit terms of either sign: that of the smaller misfit.  z, g: (m, C)"""
    z = torch.where((z.isnan().any(-1) & ~g.ne(0).any(-1)).unsqueeze(-1), 0.0, z)  # logits of masked rows are arbitrary
    if normalised:  # the gradient in the logits before their log-softmax
        g = g - z.softmax(-1) * g.sum(-1, keepdim=True)
    found = _one_sign(z, g, number)
    bad = (found.misfit > number.tolerance).nonzero().squeeze(-1)
    if z.shape[1] == 2 or not len(bad):  # of two classes each may be the label
        return found
    other = _one_sign(z[bad], -g[bad], number)
    better = other.misfit < found.misfit[bad]
    other = other[better]
    return found.replaced(bad[better], replace(other, omega=-other.omega))


def _one_sign(z: Tensor, g: Tensor, number: _Number) -> _Rows:
    """Fit terms whose weights are not negative.  z, g: (m, C)"""
    highest, top = z.max(-1, keepdim=True)
    z = z - highest
    at_top, lowest = g.gather(1, top), g.min(-1, keepdim=True)
    # where the largest probability rounds to one, so does the gradient there, to zero or either sign
    label = torch.where((at_top > 0) & (lowest.values <= -0.5 * at_top), lowest.indices, top)
    others = z.scatter(1, label, -math.inf)
    most = others.amax(-1, keepdim=True)
    q = (others - most).exp()  # (m, C), probabilities over their largest one
    rest = g.scatter(1, label, 0.0)
    unit = rest.abs().amax(-1, keepdim=True)
    rest = rest / torch.where(unit > 0, unit, 1.0)  # their squares may underflow
    slope = (rest * q).sum(-1, keepdim=True) / q.square().sum(-1, keepdim=True)
    left = rest - slope * q
    flat = q - q.sum(-1, keepdim=True) / (z.shape[1] - 1)
    flat = (slope * flat).scatter(1, label, 0.0)
    largest = (most - z.logsumexp(-1, keepdim=True)).double().squeeze(-1)
    one = unit.double().squeeze(-1)
    size, residue, slack = (x.square().sum(-1).double() * one.square() for x in (rest, left, flat))
    omega = slope.double().squeeze(-1) * one * (-largest).exp()
    own = g.gather(1, label).double().squeeze(-1)
    size_of_z = highest.abs().double().squeeze(-1)  # the loss may subtract their logsumexp, rounded
    wrong = (own + slope.double().squeeze(-1) * one * q.sum(-1).double()).abs()
    wrong = (wrong - number.own * (16 + 2 * size_of_z) * omega.abs()).clamp(min=0).square()
    total = rest.abs().sum(-1).double()
    against = (-rest).clamp(min=0).sum(-1).double() / torch.where(total > 0, total, 1.0)
    error = number.rounding * (2 + largest.abs()) + number.own * size_of_z + number.smallest / one
    missed = q.sum(-1).double() * largest.exp()
    alone = (missed > 64 * number.own) & (own.abs() * largest.exp() > 4 * number.smallest * missed)
    error = torch.where((one == 0) & alone, 0.0, error)  # the other classes should have a gradient as well
    return _Rows(omega, label.squeeze(-1), largest, missed, error, size, residue, slack, own.square(), wrong, against)


def _like(omega: Tensor, clear: Tensor, group: Tensor, groups: int) -> Tensor:
    """The mean weight of the clear terms of the same group, or of all where there is none.  # (m,)"""
    count = torch.zeros(groups, dtype=torch.float64, device=omega.device).index_add(0, group, clear.double())
    own = torch.where(clear, omega, 0.0)
    total = torch.zeros_like(count).index_add(0, group, own)
    mean = own.sum() / clear.sum().clamp(min=1)
    return torch.where(count > 0, total / count.clamp(min=1), mean)[group]


def _agreement(omega: Tensor, group: Tensor, s: Tensor) -> tuple[float, float]:
    """How far weights of one group differ, and how far they would by smoothing.  s: probability of the other label"""
    group = group.unique(return_inverse=True)[1]
    several = group.bincount()[group] > 1 if len(group) else group.bool()
    everywhere = torch.ones_like(several)
    groups = int(group.max()) + 1 if len(group) else 0
    found = []
    for x, relative in ((omega, True), (1 / s, False)):
        mean = _like(x, everywhere, group, groups)
        off = (x - mean)[several] / (torch.where(mean != 0, mean, 1.0)[several] if relative else 1.0)
        found.append(float(off.square().mean().sqrt()) if off.numel() else 0.0)
    return found[0], found[1]


# -------------------------------------------------------------------- sigmoid
def _bernoulli(likelihood: Likelihood, z: Tensor, gradient: Tensor, number: _Number, known: bool) -> Fit:
    """Fit elements, with one weight for each label, or for each label of every entry along an axis."""
    x, g = compute(z.detach()), compute(gradient).double()
    x = torch.where(x.isnan() & (g == 0), 0.0, x)
    positive = (g < 0) | ((g == 0) & (x > 0))
    s = torch.where(positive, -x, x).double().sigmoid()
    omega = g.abs() / s
    error = number.rounding * (2 + s.log().abs() + 1 / s) + number.smallest / g.abs()
    clear = (error <= number.tolerance) & (g != 0)
    found = [(*_agreement(omega[clear], group[clear], s[clear]), group) for group in _groups(positive)]
    fitting = [one for one in found[1:] if one[0] <= number.tolerance and (known or one[1] > 0)]  # of single elements any loss
    residual, contrast, group = found[0] if found[0][0] <= number.tolerance else (*fitting, found[0])[0]
    like = _slopes(g.abs(), s, clear, group, positive)
    unseen = (g != 0) | (like * s < number.smallest) | (positive & (s < number.rounding))
    weight = torch.where(unseen, like, 0.0)
    weighting = Weighting("bernoulli", z, weight, weight.new_ones(()), "sum")
    return number.made(likelihood, weighting, clear, residual, contrast)


def _groups(positive: Tensor) -> Iterator[Tensor]:
    """Groups of elements that may have one weight, by label, and by label and place along an axis.  # like z, integer"""
    label = positive.long()
    yield label
    for axis in dict.fromkeys((positive.ndim - 1, min(1, positive.ndim - 1))):
        if positive.ndim > 1:
            place = torch.arange(positive.shape[axis], device=positive.device)
            yield label + 2 * place.view(-1, *[1] * (positive.ndim - 1 - axis))


def _slopes(g: Tensor, s: Tensor, clear: Tensor, group: Tensor, positive: Tensor) -> Tensor:
    """The common weight of a group, by least squares; without clear elements that of the label, or of all.  # like z"""
    both = [torch.where(clear, x, 0.0).reshape(-1) for x in (g * s, s * s)]
    found = torch.zeros_like(both[0])
    for of in (torch.zeros_like(group), positive.long(), group):
        index = of.reshape(-1)
        size = int(index.max()) + 1 if len(index) else 0
        top, bottom = (x.new_zeros(size).index_add(0, index, x)[index] for x in both)
        found = torch.where(bottom > 0, top / torch.where(bottom > 0, bottom, 1.0), found)
    return found.reshape(g.shape)
