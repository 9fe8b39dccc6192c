"""Fisher matrices and Kronecker factors, through a maker, against dense oracles in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import GradientMaker
from gradmaker.curvature import Categorical, Curvature, FisherEmp, FisherExact, FisherMC
from gradmaker.representations import Dense, Diagonal, Kron, Representation
from tests import models, oracles
from tests.measure import EXACT, blocks, compare, custom, ggn, measure, setup
from tests.models import CLASSES, ZOO, Case

WEIGHTS = torch.tensor([0.5, 2.0, 1.3]).double()
FULL = Dense(granularity="full")


def matrix(maker: Any) -> Tensor:
    """The whole matrix, in the order of the oracles."""
    C, where = blocks(maker)["full"]
    back = where[0].argsort()
    return C[0][back][:, back]


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> bool:
    """Equal, where zero may be rounding."""
    return float(torch.linalg.norm(found - expected)) < tolerance * max(float(torch.linalg.norm(expected)), 1e-12)


# ------------------------------------------------------------------ losses
def soft(t: Tensor) -> Tensor:
    q = torch.arange(1.0, t.numel() * CLASSES + 1).sin().square().double().reshape(t.numel(), CLASSES) + 0.1
    return q / q.sum(-1, keepdim=True)


def masked(t: Tensor) -> Tensor:
    """Every third target is left out."""
    return torch.where(torch.arange(t.numel()).reshape(t.shape) % 3 == 1, -100, t)


def real(t: Tensor) -> Tensor:
    return torch.arange(1.0, t.numel() * CLASSES + 1).cos().square().double().reshape(t.numel(), CLASSES)


Loss = Callable[[Tensor, Tensor], Tensor]  # of logits (m, C) and targets (m,)
LOSSES: dict[str, Loss] = {
    "ce": F.cross_entropy,
    "ce_module": nn.CrossEntropyLoss(),
    "ce_scaled": lambda z, t: 3 * F.cross_entropy(z, t),
    "ce_ignored": lambda z, t: F.cross_entropy(z, masked(t)),
    "ce_weighted": partial(F.cross_entropy, weight=WEIGHTS),
    "ce_weighted_ignored": lambda z, t: F.cross_entropy(z, masked(t), weight=WEIGHTS),
    "ce_smoothed": partial(F.cross_entropy, label_smoothing=0.2),
    "ce_smoothed_weighted": lambda z, t: F.cross_entropy(z, masked(t), label_smoothing=0.2, weight=WEIGHTS),
    "ce_soft": lambda z, t: F.cross_entropy(z, soft(t)),
    "ce_soft_weighted": lambda z, t: F.cross_entropy(z, soft(t), weight=WEIGHTS, label_smoothing=0.1),
    "ce_sum": partial(F.cross_entropy, reduction="sum"),
    "ce_sum_ignored": lambda z, t: F.cross_entropy(z, masked(t), reduction="sum"),
    "ce_sum_weighted": partial(F.cross_entropy, reduction="sum", weight=WEIGHTS),
    "ce_by_hand": lambda z, t: F.cross_entropy(z, t, reduction="none").sum() / 7,
    "nll": lambda z, t: F.nll_loss(z.log_softmax(-1), t),
    "mse": lambda z, t: F.mse_loss(z, real(t)),
    "mse_sum": lambda z, t: F.mse_loss(z, real(t), reduction="sum"),
    "bce": lambda z, t: F.binary_cross_entropy_with_logits(z, real(t)),
    "bce_sum": lambda z, t: F.binary_cross_entropy_with_logits(z, real(t), reduction="sum"),
    "bce_weighted": lambda z, t: F.binary_cross_entropy_with_logits(z, real(t), weight=WEIGHTS, pos_weight=WEIGHTS + 1),
    "two": lambda z, t: 0.5 * F.cross_entropy(z, t) + 0.1 * F.mse_loss(z, real(t)),
}
SEQUENCE: dict[str, Callable[[], Case]] = {
    "last": partial(models.tagger, "last", mix=True),
    "torch": partial(models.tagger, "torch", mix=True),
    "flat": partial(models.tagger, "flat", mix=True),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "last": lambda y: y.flatten(0, 1),
    "torch": lambda y: y.mT.flatten(0, 1),
    "flat": lambda y: y,
}


def lost(make: Callable[[], Case], loss: Loss, rows: Callable[[Tensor], Tensor] = lambda y: y) -> Case:
    """A case with another loss, on logits as rows."""
    return make()._replace(loss=lambda y, t: loss(rows(y), t.flatten()))


@pytest.mark.parametrize("loss", LOSSES)
def test_exact_fisher_is_the_gauss_newton_matrix(loss: str) -> None:
    case = lost(models.mlp, LOSSES[loss])
    compare(measure(case), ggn(lost(models.mlp, LOSSES[loss])))


@pytest.mark.parametrize("layout", SEQUENCE)
@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "two"])
def test_exact_fisher_of_sequences(layout: str, loss: str) -> None:
    """Positions are coupled by the model: cross terms of a sequence belong to the matrix."""
    make = partial(lost, SEQUENCE[layout], LOSSES[loss], LAYOUTS[layout])
    compare(measure(make()), ggn(make()))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("layout", ["last", "torch"])
def test_sequence_layouts_as_torch_takes_them(layout: str, reduction: str) -> None:
    def make() -> Case:
        def loss(y: Tensor, t: Tensor) -> Tensor:
            return F.cross_entropy(y.mT if layout == "last" else y, masked(t), reduction=reduction)

        return SEQUENCE[layout]()._replace(loss=loss)

    compare(measure(make()), ggn(make()))


def test_mean_squared_error_has_no_half() -> None:
    """``2 / (n C) J^T J``, as torch's mean has it."""
    case = models.mlp_gaussian()
    J = oracles.batch_jacobian(models.mlp_gaussian().model, case.x)
    compare(measure(case), 2 / case.t.numel() * J.mT @ J)


def test_exact_fisher_is_the_sum_over_classes() -> None:
    """The definition, by enumeration."""
    compare(measure(models.mlp()), oracles.categorical_fisher(models.mlp().model, models.mlp().x, 6))


def test_hessian_of_one_layer_of_a_piecewise_linear_net() -> None:
    case = models.mlp_relu()
    H = oracles.hessian(case.model, case.x, lambda z: case.loss(z, case.t))
    compare(measure(models.mlp_relu(), FisherExact(), Dense()), H, tolerance=1e-9)
    compare(
        measure(models.linear()),
        oracles.hessian(models.linear().model, models.linear().x, lambda z: F.cross_entropy(z, case.t)),
    )


@pytest.mark.parametrize("chunk", [1, 2, 1000])
@pytest.mark.parametrize("representation", [FULL, Kron()], ids=["dense", "kron"])
def test_chunks_add_up(chunk: int, representation: Representation) -> None:
    """Over two batches of different lengths: inputs are counted once a step, whatever the chunks."""
    results = []
    for size in (chunk, 64):
        case = SEQUENCE["torch"]()
        maker = custom(case.model, FisherExact(chunk=size), representation, decay=0.5)
        for length in (3, 2):
            setup(maker, case._replace(x=case.x[:, :length], t=case.t[:, :length]))
            maker.forward_and_backward()
        results.append(blocks(maker))
    for name, (C, _) in results[0].items():
        assert close(C, results[1][name][0])


def test_too_many_columns_are_refused() -> None:
    with pytest.raises(ValueError, match=r"9 backward passes.*FisherMC\(samples=1\).*max_columns \(now 8\)"):
        measure(models.tagger(), FisherExact(max_columns=8))


def test_declared_likelihood() -> None:
    """A loss of the user's own, with the likelihood and the logits declared."""
    case = models.mlp()
    maker = custom(case.model, FisherExact(), FULL, likelihood=Categorical())
    y = maker.setup_model_call(case.model, case.x)
    maker.setup_logits_repr(y)
    maker.setup_loss_call(lambda z, t: -z.log_softmax(-1)[torch.arange(6), t].mean(), y, case.t)
    maker.forward_and_backward()
    compare(maker, ggn(models.mlp()))


# ------------------------------------------------------------------ the empirical Fisher
EMPIRICAL = [name for name in LOSSES if name not in ("two", "ce_module", "ce_by_hand")]


def single(case: Case, root: Tensor) -> Callable[[Any, int], Tensor]:
    """``sqrt(M_n)`` times the part of one example in the loss."""
    rows = case.t.numel() // len(case.x)

    def part(y: Tensor, n: int) -> Tensor:
        with torch.no_grad():
            z = case.model(case.x).flatten(0, -2)
        at = slice(n * rows, (n + 1) * rows)
        whole = torch.cat([z[: at.start], y.reshape(-1, CLASSES), z[at.stop :]])
        return root[n] * case.loss(whole.unflatten(0, (len(case.x), -1)), case.t)

    return part


def weights_of(loss: str, t: Tensor) -> Tensor:
    """What every term weighs in the loss, by hand; of squares and of binary losses every element is a term."""
    n = t.numel()
    if loss.startswith(("mse", "bce")):
        e = WEIGHTS * (1 + WEIGHTS * real(t)) if "weighted" in loss else torch.ones(n, CLASSES).double()
        return e if "sum" in loss else e / (n * CLASSES)
    w = WEIGHTS if "weighted" in loss else torch.ones(CLASSES).double()
    if "soft_" in loss or loss.endswith("soft"):
        q = 0.9 * soft(t) + 0.1 / CLASSES if "weighted" in loss else soft(t)
        return (q * w).sum(1) / n
    kept = masked(t) if "ignored" in loss or loss == "ce_smoothed_weighted" else t
    observed = torch.stack([w[c] if c >= 0 else w.new_zeros(()) for c in kept])
    found = 0.8 * observed + 0.2 * w.mean() * (kept >= 0) if "smoothed" in loss else observed
    return found * (3 if "scaled" in loss else 1) / (1 if "sum" in loss else observed.sum())


def terms_of(loss: str, t: Tensor) -> Tensor:
    """``M_n = sum omega / sum omega^2`` over the terms of each example.  # (n,)"""
    omega = weights_of(loss, t.flatten()).reshape(len(t), -1)
    return omega.sum(1) / omega.square().sum(1).clamp(min=1e-300)


@pytest.mark.parametrize("loss", EMPIRICAL)
@pytest.mark.parametrize("make", [models.mlp, SEQUENCE["last"], models.attention], ids=["mlp", "tagger", "attention"])
def test_empirical_fisher_of_examples(make: Callable[[], Case], loss: str) -> None:
    """One gradient a sequence, M of its own terms."""
    case = lost(make, LOSSES[loss], lambda y: y.flatten(0, -2))
    oracle = oracles.empirical_fisher(case.model, case.x, single(case, terms_of(loss, case.t).sqrt()), 1.0)
    for representation in (FULL, Dense(), Diagonal(granularity="layer")):
        maker = measure(lost(make, LOSSES[loss], lambda y: y.flatten(0, -2)), FisherEmp(), representation)
        compare(maker, oracle)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("left_out", [False, True])
@pytest.mark.parametrize("layout", SEQUENCE)
def test_empirical_fisher_of_tokens(layout: str, left_out: bool, reduction: str) -> None:
    target = masked if left_out else torch.clone

    def make() -> Case:
        return lost(SEQUENCE[layout], lambda z, t: F.cross_entropy(z, target(t), reduction=reduction), LAYOUTS[layout])

    case = SEQUENCE["last"]()
    t = target(case.t.flatten()).reshape(case.t.shape)
    terms = 1.0 if reduction == "sum" else float((t >= 0).sum())

    def token(z: Tensor, n: int, r: int) -> Tensor:
        return oracles.loss_term("categorical", z, t[n, r])

    oracle = oracles.empirical_fisher_tokens(case.model, case.x, token, terms)
    compare(measure(make(), FisherEmp(examples="token")), oracle)
    other = matrix(measure(make(), FisherEmp(examples="sequence")))
    assert oracles.relative_error(other, matrix(measure(make(), FisherEmp(examples="token")))) > 1e-2


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_empirical_fisher_of_an_unrecognised_loss(reduction: str) -> None:
    case = models.mlp()._replace(loss=lambda z, t: getattr(-z.log_softmax(-1)[torch.arange(6), t], reduction)())
    known = models.mlp()._replace(loss=partial(F.cross_entropy, reduction=reduction))
    found = matrix(measure(case, FisherEmp(), loss_reduction=reduction))
    assert oracles.relative_error(found, matrix(measure(known, FisherEmp()))) < EXACT


# ------------------------------------------------------------------ scale, masks, weights
@pytest.mark.parametrize(
    "curvature",
    [FisherExact(), FisherMC(samples=3), FisherEmp(), FisherEmp(examples="token")],
    ids=["exact", "mc", "emp", "token"],
)
def test_scale_of_the_loss(curvature: Curvature) -> None:
    scaled = models.mlp()._replace(loss=lambda z, t: 4 * F.cross_entropy(z, t))
    found, unit = matrix(measure(scaled, curvature)), matrix(measure(models.mlp(), curvature))
    assert oracles.relative_error(found, 4 * unit) < 1e-12


@pytest.mark.parametrize("curvature", [FisherExact(), FisherMC(samples=3), FisherEmp()], ids=["exact", "mc", "emp"])
def test_sum_is_the_mean_times_the_number_of_examples(curvature: Curvature) -> None:
    """Each is the curvature of the very loss; the empirical one is ``sum g g^T`` and ``1/n sum g g^T`` of unscaled ones."""
    summed = matrix(measure(models.mlp()._replace(loss=LOSSES["ce_sum"]), curvature))
    assert oracles.relative_error(summed, 6 * matrix(measure(models.mlp(), curvature))) < 1e-12


@pytest.mark.parametrize("curvature", [FisherExact(), FisherEmp(), FisherEmp(examples="token")], ids=["exact", "emp", "token"])
@pytest.mark.parametrize("representation", [FULL, Kron(), Kron(sharing="reduce")], ids=["dense", "expand", "reduce"])
def test_ignored_tokens_are_as_if_removed(curvature: Curvature, representation: Representation) -> None:
    """The last position of every sequence, where positions do not see each other; A skips it as well."""
    case = models.tagger("last")
    cut = case.t.clone()
    cut[:, -1] = -100
    found = blocks(measure(case._replace(t=cut), curvature, representation))
    short = models.tagger("last")
    for name, (C, _) in blocks(measure(short._replace(x=case.x[:, :-1], t=case.t[:, :-1]), curvature, representation)).items():
        assert oracles.relative_error(found[name][0], C) < 1e-12, name


@pytest.mark.parametrize("representation", [FULL, Kron()], ids=["dense", "kron"])
def test_a_batch_of_ignored_targets_is_finite(representation: Representation) -> None:
    """A sum over no terms has no curvature; a mean over none is not a number, and such a step is skipped."""
    for reduction, skipped in (("sum", 0), ("mean", 1)):
        case = models.mlp()
        maker = custom(case.model, FisherExact(), representation, decay=0.5)
        setup(maker, case)
        maker.forward_and_backward()
        before = {name: C.clone() for name, (C, _) in blocks(maker).items()}
        empty = case._replace(t=torch.full_like(case.t, -100), loss=partial(F.cross_entropy, reduction=reduction))
        setup(maker, empty)
        maker.forward_and_backward()
        assert maker.skipped == skipped
        for name, (C, _) in blocks(maker).items():
            assert C.isfinite().all()
            assert not skipped or torch.equal(C, before[name])


def test_class_weight_two_is_the_class_twice() -> None:
    case = models.mlp()._replace(loss=partial(F.cross_entropy, reduction="sum", weight=torch.tensor([1.0, 2.0, 1.0]).double()))
    again = case.t == 1
    assert again.any()
    more = models.mlp()._replace(
        x=torch.cat([case.x, case.x[again]]), t=torch.cat([case.t, case.t[again]]), loss=LOSSES["ce_sum"]
    )
    assert oracles.relative_error(matrix(measure(case)), matrix(measure(more))) < EXACT


def test_label_smoothing_changes_only_the_empirical_fisher() -> None:
    smooth = models.mlp()._replace(loss=LOSSES["ce_smoothed"])
    assert oracles.relative_error(matrix(measure(smooth)), matrix(measure(models.mlp()))) < 1e-12
    assert oracles.relative_error(matrix(measure(smooth, FisherEmp())), matrix(measure(models.mlp(), FisherEmp()))) > 1e-2


@pytest.mark.parametrize("curvature", [FisherExact(), FisherEmp()], ids=["exact", "emp"])
def test_order_of_examples(curvature: Curvature) -> None:
    case, order = models.attention(), torch.tensor([2, 0, 3, 1])
    shuffled = models.attention()._replace(x=case.x[order], t=case.t[order])
    for representation in (FULL, Kron()):
        found = blocks(measure(shuffled, curvature, representation))
        for name, (C, _) in blocks(measure(case, curvature, representation)).items():
            assert oracles.relative_error(found[name][0], C) < 1e-12


# ------------------------------------------------------------------ sampled targets
SAMPLED = {"ce": models.mlp, "tagger": SEQUENCE["torch"], "bce": models.mlp_bernoulli, "mse": models.mlp_gaussian}


def draws(make: Callable[[], Case], samples: int, seeds: int) -> Tensor:
    """(seeds, P, P)"""
    return torch.stack([matrix(measure(make(), FisherMC(samples=samples), seed=seed)) for seed in range(seeds)])


@pytest.mark.parametrize("name", SAMPLED)
@pytest.mark.parametrize("samples", [1, 2, 50])
def test_sampled_fisher_is_unbiased(name: str, samples: int) -> None:
    """The mean over seeds within 5 standard errors: of the trace, and of random quadratic forms."""
    found, exact = draws(SAMPLED[name], samples, 60), ggn(SAMPLED[name]())
    probes = torch.randn(3, len(exact)).double()
    values = torch.cat(
        [found.diagonal(dim1=1, dim2=2).sum(1, keepdim=True), torch.einsum("qi,sij,qj->sq", probes, found, probes)], 1
    )
    expected = torch.cat([exact.trace()[None], torch.einsum("qi,ij,qj->q", probes, exact, probes)])
    assert ((values.mean(0) - expected).abs() < 5 * values.std(0) / 60**0.5).all()


def test_error_of_sampling_falls_as_one_over_the_root() -> None:
    exact, counts = ggn(models.mlp()), (1, 8, 64, 512)
    errors = [(draws(models.mlp, k, 12) - exact).square().sum((1, 2)).mean().sqrt() for k in counts]
    slope = (errors[-1].log() - errors[0].log()) / torch.tensor(512.0).log()
    assert abs(float(slope) + 0.5) < 0.15


def test_draws_depend_on_seed_and_step_alone() -> None:
    def run(seed: int, steps: int) -> Tensor:
        case = models.mlp()
        maker = custom(case.model, FisherMC(), FULL, seed=seed)
        for _ in range(steps):
            setup(maker, case)
            maker.forward_and_backward()
            torch.rand(3)
        return matrix(maker)

    assert torch.equal(run(0, 1), run(0, 1))
    assert not torch.equal(run(0, 1), run(1, 1))
    assert not torch.equal(run(0, 1), run(0, 2))


# ------------------------------------------------------------------ Kronecker factors
FACTORED = [
    "mlp", "mlp_no_bias", "mlp_relu_inplace", "tagger_last", "embedding_mean", "attention", "called_twice",
    *(name for name in models.CONV_CASES if "2d" in name), "conv1d_stride", "conv3d_groups", "checkpoint_reentrant",
    "checkpoint_saved", "frozen", "unused", "layer_norm",
]  # fmt: skip


def layers_of(model: nn.Module) -> list[str]:
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    return [
        k
        for k, m in model.named_modules()
        if isinstance(m, kinds) and k != "idle" and any(p.requires_grad for p in m.parameters())
    ]


def factors_of(maker: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """By layer: (A, B), each (G, d, d)."""
    found = {}
    for block in maker.plan.blocks:
        if not isinstance(block.triple.representation, Kron):
            continue
        left, right = (torch.diag_embed(f) if f.ndim == 2 else f for f in block.triple.representation.factors(block.state))
        for site, slot in zip(block.sites, block.slots, strict=True):
            pair = (left[slot], right[slot]) if site.kind == "embedding" else (right[slot], left[slot])
            found[site.module_names[0]] = pair
    return found


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", FACTORED)
def test_kronecker_factors(name: str, sharing: Any) -> None:
    twin = models.checkpointed(None) if name.startswith("checkpoint") else ZOO[name]()
    columns = oracles.exact_columns("categorical", twin.t)
    found = factors_of(measure(ZOO[name](), FisherExact(), Kron(sharing=sharing)))
    for layer in layers_of(twin.model):
        kept = "expand" if isinstance(twin.model.get_submodule(layer), nn.Embedding) else sharing  # A would not be diagonal
        pairs = oracles.kfac_factors(twin.model, twin.x, layer, columns, twin.t.numel(), sharing=kept)
        for j, expected in enumerate(pairs):
            assert close(found[layer][0][j], expected.A), layer
            assert close(found[layer][1][j], expected.B), layer


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_masked_positions_are_not_averaged_into_the_inputs(sharing: Any) -> None:
    case = models.tagger("last")
    t = masked(case.t)
    t[0] = -100  # a whole sequence as well
    case = case._replace(t=t)
    found = factors_of(measure(case, FisherExact(), Kron(sharing=sharing)))
    twin = models.tagger("last")
    columns = oracles.exact_columns("categorical", t)
    for layer in ("hidden", "head"):
        (expected,) = oracles.kfac_factors(
            twin.model, twin.x, layer, columns, int((t >= 0).sum()), sharing=sharing, valid=t >= 0
        )
        assert oracles.relative_error(found[layer][0][0], expected.A) < 1e-12
        assert oracles.relative_error(found[layer][1][0], expected.B) < 1e-12


def test_padding_takes_no_part_in_the_factors() -> None:
    """As if the padding tokens were removed: neither A nor B counts their positions."""
    case, twin = models.embedding_mean(0), models.embedding_mean(0)
    A, B = factors_of(measure(case, FisherExact(), Kron()))["embedding"]
    columns, keep = oracles.exact_columns("categorical", case.t), case.x != 0
    tape = oracles.layer_tape(twin.model, twin.x, "embedding", columns)
    rows = torch.cat([g[0][0][keep[n]] for n, (_, per_column) in enumerate(tape) for g in [[c[0]] for c in per_column]])
    assert close(B[0], rows.mT @ rows / len(case.x))
    assert close(A[0], torch.diag(torch.bincount(case.x[keep], minlength=7).double() / keep.sum()))


def test_separate_bias() -> None:
    """The weight's block holds no bias column, the bias' block is B."""
    from gradmaker import KfacGradientConfig, KfacGradientMaker

    case = models.mlp()
    maker = KfacGradientMaker(case.model, KfacGradientConfig(fisher=FisherExact(), bias="separate", decay=0.0))
    setup(maker, case)  # type: ignore[arg-type]
    maker.forward_and_backward()
    columns = oracles.exact_columns("categorical", case.t)
    dense = blocks(maker)  # type: ignore[arg-type]
    for layer in ("0", "2"):
        twin = models.mlp()
        (joint,) = oracles.kfac_factors(twin.model, twin.x, layer, columns, 6)
        i = joint.A.shape[0] - 1
        assert oracles.relative_error(dense[f"{layer}.weight"][0][0], oracles.kron(joint.B, joint.A[:i, :i])) < 1e-12
        assert oracles.relative_error(dense[f"{layer}.bias"][0][0], joint.B) < 1e-12


ONE = [name for name in ("mlp", "mlp_gaussian", "mlp_bernoulli", "mlp_no_bias", "frozen")]


@pytest.mark.parametrize("name", ONE)
def test_kronecker_is_exact_for_one_datum(name: str) -> None:
    case, twin = ZOO[name](), ZOO[name]()
    one = case._replace(x=case.x[:1], t=case.t[:1])
    compare(measure(one, FisherExact(), Kron()), ggn(twin._replace(x=case.x[:1], t=case.t[:1])), tolerance=1e-12)


def test_kronecker_is_exact_where_all_rows_are_equal() -> None:
    case, twin = models.mlp(), models.mlp()
    x = case.x[:1].expand(6, -1)
    compare(measure(case._replace(x=x), FisherExact(), Kron()), ggn(twin._replace(x=x)))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_kronecker_is_exact_for_deep_linear_nets(reduction: str) -> None:
    loss = partial(F.mse_loss, reduction=reduction)
    compare(
        measure(models.deep_linear()._replace(loss=loss), FisherExact(), Kron()), ggn(models.deep_linear()._replace(loss=loss))
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("pooled", [False, True])
def test_sharing_is_exact_where_it_should_be(pooled: bool, reduction: str) -> None:
    """Expand for a loss on positions, reduce for a mean over positions; and each fails where the other holds."""

    def make() -> Case:
        return models.deep_linear(3, pooled)._replace(loss=partial(F.mse_loss, reduction=reduction))

    right, wrong = ("reduce", "expand") if pooled else ("expand", "reduce")
    oracle = ggn(make())
    compare(measure(make(), FisherExact(), Kron(sharing=right)), oracle, tolerance=1e-9)
    C, where = blocks(measure(make(), FisherExact(), Kron(sharing=wrong)))["layers.0"]
    assert oracles.relative_error(C[0], oracle[where[0]][:, where[0]]) > 1e-2


def test_kronecker_is_not_exact_in_general() -> None:
    oracle = ggn(models.mlp())
    for C, where in blocks(measure(models.mlp(), FisherExact(), Kron())).values():
        assert oracles.relative_error(C[0], oracle[where[0]][:, where[0]]) > 1e-3


# ------------------------------------------------------------------ micro-batches
MICRO: dict[str, tuple[Curvature, Representation]] = {
    "exact": (FisherExact(), FULL),
    "empirical": (FisherEmp(), FULL),
    "tokens": (FisherEmp(examples="token"), FULL),
    "kron": (FisherExact(), Kron()),
    "kron_reduce": (FisherExact(), Kron(sharing="reduce")),
    "diagonal": (FisherExact(), Diagonal(granularity="layer")),
}


@pytest.mark.parametrize("decay", [0.0, 0.7, None])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", MICRO)
def test_micro_batches_are_one_batch(name: str, reduction: str, decay: float | None) -> None:
    """Two steps, each in parts, are two whole steps: statistics and gradients."""
    curvature, representation = MICRO[name]
    results = []
    uneven = reduction == "mean" or not isinstance(representation, Kron)  # A is a mean over parts: with weight 1, of equal ones
    for sizes in ([4], [1, 3], [2, 1, 1]) if uneven else ([4], [2, 2], [1, 1, 1, 1]):
        case = models.attention()._replace(loss=partial(F.cross_entropy, reduction=reduction))
        maker = custom(case.model, curvature, representation, decay=decay)
        for _ in range(2):
            case.model.zero_grad()
            for x, t in zip(case.x.split(sizes), case.t.split(sizes), strict=True):
                setup(maker, case._replace(x=x, t=t))
                maker.accumulate(len(x) / 4 if reduction == "mean" else 1.0)
            maker.precondition()
        results.append((blocks(maker), oracles.gradient_vector(case.model)))
    for found, gradient in results[1:]:
        assert oracles.relative_error(gradient, results[0][1]) < EXACT
        for key, (C, _) in results[0][0].items():
            assert close(found[key][0], C, EXACT), key


def test_plain_gradients_of_micro_batches() -> None:
    case, whole = models.attention(), models.attention()
    maker = GradientMaker(case.model)
    for x, t in zip(case.x.split([1, 3]), case.t.split([1, 3]), strict=True):
        y = maker.setup_model_call(case.model, x)
        maker.setup_loss_call(case.loss, y, t)
        maker.accumulate(len(x) / 4)
    maker.precondition()
    whole.run().backward()
    assert oracles.relative_error(oracles.gradient_vector(case.model), oracles.gradient_vector(whole.model)) < 1e-12
