"""The oracles against each other, against torch.autograd.functional and against closed forms."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import models, oracles
from tests.models import CLASSES, ZOO, Case

EXACT = 1e-10


def close(found: Tensor, expected: Tensor, tolerance: float = EXACT) -> None:
    assert found.shape == expected.shape
    assert oracles.relative_error(found, expected) < tolerance


def select_of(name: str) -> oracles.Select:
    return models.logits_of if name.startswith("structured") else oracles.identity


def loss_on(case: Case) -> Callable[[Tensor], Tensor]:
    return lambda z: case.loss(z, case.t)


def term(case: Case) -> Callable[[Any, int], Tensor]:
    """The mean loss of the batch of one."""
    return lambda y, n: case.loss(y, case.t[n : n + 1])


def autograd_hessian(case: Case, names: Sequence[str]) -> Tensor:
    parameters = [p for name, p in case.model.named_parameters() if name in names]

    def loss(*values: Tensor) -> Tensor:
        y = torch.func.functional_call(case.model, dict(zip(names, values, strict=True)), (case.x,))
        return case.loss(y, case.t)

    rows = torch.autograd.functional.hessian(loss, tuple(parameters))
    sizes = [p.numel() for p in parameters]
    return torch.cat(
        [torch.cat([h.reshape(a, b) for h, b in zip(row, sizes, strict=True)], 1) for row, a in zip(rows, sizes, strict=True)]
    )


COUPLED = [name for name in ZOO if name.startswith("batch_norm")]
ONE_BY_ONE = [name for name in ZOO if name not in COUPLED]


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_example_gradients_sum_to_the_batch_gradient(name: str) -> None:
    case = ZOO[name]()
    if name == "checkpoint_reentrant":  # torch refuses autograd.grad through it: the reference is its plain twin
        case = models.checkpointed(None)._replace(x=case.x)
    gradients = oracles.per_example_gradients(case.model, case.x, term(case))
    ZOO[name]().run()
    twin = ZOO[name]()
    twin.run().backward()
    close(oracles.gradient_rows(gradients).mean(0), oracles.gradient_vector(twin.model), 1e-12)


@pytest.mark.parametrize("name", COUPLED)
def test_frozen_statistics(name: str) -> None:
    """The norm's own parameters and all after it see the batch gradient; running statistics stay."""
    case = ZOO[name]()
    state = copy.deepcopy(case.model.state_dict())
    gradients = oracles.per_example_gradients(case.model, case.x, term(case), frozen_statistics=True)
    assert all(torch.equal(value, state[key]) for key, value in case.model.state_dict().items()) and case.model.training
    case.run().backward()
    for key in gradients:
        if not key.startswith("first"):
            close(gradients[key].mean(0), case.model.get_parameter(key).grad, 1e-12)
    if "zero" not in name:  # the layer before feels the coupling: the convention must differ there
        assert oracles.relative_error(gradients["first.weight"].mean(0), case.model.get_parameter("first.weight").grad) > 1e-3


def test_frozen_statistics_closed_form() -> None:
    case = models.normed("batch_norm")
    gradients = oracles.per_example_gradients(case.model, case.x, term(case), frozen_statistics=True)
    h = case.model.first(case.x).detach()  # (n, r, c)
    x_hat = (h - h.mean((0, 1))) / (h.var((0, 1), correction=0) + case.model.norm.eps).sqrt()
    y = (x_hat * case.model.norm.weight + case.model.norm.bias).detach().requires_grad_()
    loss = F.cross_entropy(case.model.head(torch.tanh(y).sum(1)), case.t, reduction="sum")
    (g,) = torch.autograd.grad(loss, y)
    close(gradients["norm.weight"], (g * x_hat).sum(1))
    close(gradients["norm.bias"], g.sum(1))


@pytest.mark.parametrize("name", ["mlp", "attention", "tied", "embedding_mean", "structured_dict", "layer_norm"])
def test_jacobians_agree(name: str) -> None:
    case, select = ZOO[name](), select_of(name)
    each = oracles.jacobian(case.model, case.x, select=select)
    assert each.shape[:2] == (len(case.x), CLASSES)
    close(oracles.batch_jacobian(case.model, case.x, select=select), each.flatten(0, 1), 1e-12)


HESSIANS = ["mlp", "mlp_gaussian", "conv2d_circular", "attention", "tied", "called_twice", "embedding_mean", "batch_norm"]
HESSIANS += ["frozen", "bare_scale", "tagger_mixed", "mlp_relu_inplace", "mlp_bernoulli", "checkpoint_saved"]


@pytest.mark.parametrize("name", HESSIANS)
def test_hessian_is_autograds(name: str) -> None:
    case = ZOO[name]()
    names = oracles.parameter_names(case.model)
    H = oracles.hessian(case.model, case.x, loss_on(case), names)
    close(H, autograd_hessian(case, names))
    close(H, H.mT, 1e-12)


@pytest.mark.parametrize("name", ["weight_norm", "batch_norm", "layer_norm", "group_norm", "rms_norm", "tied"])
def test_hessian_by_differences(name: str) -> None:
    case = ZOO[name]()
    H = oracles.hessian_by_differences(case.model, case.x, loss_on(case))
    close(H, H.mT, 1e-6)
    if name != "weight_norm":  # torch 2.13: torch._weight_norm fails gradgradcheck, its Hessian is 0.4 off
        close(oracles.hessian(case.model, case.x, loss_on(case)), H, 1e-6)


def test_ggn_is_the_hessian_where_the_net_is_linear_in_its_parameters() -> None:
    for name, layer in (("linear", ""), ("mlp", "2."), ("mlp_bernoulli", "2."), ("mlp_relu", "0."), ("attention", "head.")):
        case = ZOO[name]()
        names = [key for key in oracles.parameter_names(case.model) if key.startswith(layer)]
        args = (case.model, case.x, loss_on(case), names)
        close(oracles.loss_ggn(*args), oracles.hessian(*args), 1e-9)
    case = models.mlp()
    args = (case.model, case.x, loss_on(case))
    assert oracles.relative_error(oracles.loss_ggn(*args), oracles.hessian(*args)) > 1e-3


def test_output_hessians_closed_form() -> None:
    z, y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, -100])
    p, weight = z.softmax(-1), torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    Lambda = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    Lambda[4] = 0
    close(oracles.output_hessian("categorical", z, y), Lambda)
    close(oracles.output_hessian("categorical", z, y, label_smoothing=0.3), Lambda)
    close(oracles.output_hessian("categorical", z, y, weight=weight), Lambda * weight[y.clamp(min=0), None, None])
    smoothed = 0.7 * weight[y.clamp(min=0)] + 0.3 * weight.mean()
    found = oracles.output_hessian("categorical", z, y, weight=weight, label_smoothing=0.3)
    close(found, Lambda * smoothed[:, None, None])
    eye = torch.eye(4, dtype=torch.float64).expand(5, 4, 4)
    close(oracles.output_hessian("gaussian", z, z * 0), 2 * eye)
    close(oracles.output_hessian("gaussian", z, z * 0, variance=4.0), eye / 4)
    s, label = z.sigmoid(), (z > 0).double()
    slope = (1 - label + 3 * label) * s * (1 - s)
    found = oracles.output_hessian("bernoulli", z, label, pos_weight=torch.full((4,), 3.0, dtype=torch.float64))
    close(found, torch.diag_embed(slope))


WEIGHT = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.2}, {"weight": WEIGHT}, {"weight": WEIGHT, "label_smoothing": 0.2}]
)
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("tokens", [False, True])
def test_ggn_is_the_sum_of_columns_categorical(options: dict[str, Any], ignored: bool, tokens: bool) -> None:
    """The mean reduction, with everything that changes what it divides by."""
    case = models.tagger("torch", mix=True) if tokens else models.mlp()
    select: oracles.Select = (lambda y: y.mT) if tokens else oracles.identity
    t = case.t.clone()
    if ignored:
        t.view(-1)[:2] = -100
    kept = t[t != -100]
    terms = float(WEIGHT[kept].sum()) if "weight" in options else len(kept)
    columns = oracles.exact_columns("categorical", t, **options)
    found = oracles.fisher_from_columns(case.model, case.x, columns, terms, select=select)
    close(found, oracles.loss_ggn(case.model, case.x, lambda z: F.cross_entropy(z, t, **options)))
    if not (options or ignored or tokens):
        close(found, oracles.categorical_fisher(case.model, case.x, terms))


@pytest.mark.parametrize("name", ["mlp_gaussian", "mlp_bernoulli", "deep_linear_positions"])
def test_ggn_is_the_sum_of_columns_per_element_means(name: str) -> None:
    case = ZOO[name]()
    d = case.t.shape[-1]
    if name == "mlp_bernoulli":
        columns = oracles.exact_columns("bernoulli", case.t, weight=torch.full((d,), 1 / d, dtype=torch.float64))
    else:
        columns = oracles.exact_columns("gaussian", case.t, variance=d / 2)
    found = oracles.fisher_from_columns(case.model, case.x, columns, case.t.numel() // d)
    close(found, oracles.loss_ggn(case.model, case.x, loss_on(case)))


def test_empirical_fishers_agree() -> None:
    """Sequences and tokens as examples: loops over losses against loops over output vectors; they are different matrices."""
    case = models.tagger("last", mix=True)
    t, M = case.t, case.t.numel()
    found = {}
    for example in ("token", "sequence"):
        columns = oracles.empirical_columns("categorical", t, example=example)
        found[example] = oracles.fisher_from_columns(case.model, case.x, columns, M)
    by_sequence = oracles.empirical_fisher(case.model, case.x, lambda y, n: F.cross_entropy(y[0], t[n], reduction="sum"), M)
    by_token = oracles.empirical_fisher_tokens(case.model, case.x, lambda z, n, r: F.cross_entropy(z, t[n, r]), M)
    close(found["sequence"], by_sequence)
    close(found["token"], by_token)
    assert oracles.relative_error(by_token, by_sequence) > 1e-2


# --- convolution ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", models.CONV_CASES)
def test_patches_reproduce_the_convolution(name: str) -> None:
    case = ZOO[name]()
    conv = case.model.convolution
    W = conv.weight.reshape(conv.groups, -1, conv.weight[0].numel())
    y = torch.einsum("goi,ntgi->ngot", W, oracles.conv_patches(conv, case.x)).flatten(1, 2)
    if conv.bias is not None:
        y = y + conv.bias[:, None]
    close(y, conv(case.x).flatten(2), 1e-12)


@pytest.mark.parametrize("name", ["conv1d_same", "conv2d_depthwise_multiplier", "conv3d_groups", "linear", "embedding_padding"])
def test_tape_rebuilds_example_gradients(name: str) -> None:
    """J_n = sum_r g a^T from the rows of the tape is the gradient of the weight."""
    case = ZOO[name]()
    layer = {"l": "", "e": "embedding", "c": "convolution"}[name[0]]
    columns = oracles.empirical_columns("categorical", case.t)
    gradients = oracles.per_example_gradients(case.model, case.x, term(case))
    module = case.model.get_submodule(layer)
    for n, ((a,), ((g,),)) in enumerate(oracles.layer_tape(case.model, case.x, layer, columns)):
        J = torch.einsum("rgo,rgi->goi", oracles._output_rows(module, g), oracles._input_rows(module, a)).flatten(0, 1)
        weight = gradients[f"{layer}.weight".lstrip(".")][n]
        close(J[:, : weight[0].numel()] if layer != "embedding" else J.mT, weight.flatten(1))


# --- Kronecker factors ----------------------------------------------------------------------------------------------------


def joint_block(case: Case, C: Tensor, layer: str) -> Tensor:
    slices = oracles.parameter_slices(case.model)
    W = case.model.get_submodule(layer).weight
    block = oracles.layer_block(C, [slices[f"{layer}.weight"], slices[f"{layer}.bias"]])
    return oracles.reorder(block, oracles.joint_order(len(W), W[0].numel()))


@pytest.mark.parametrize("kind", ["categorical", "gaussian", "bernoulli"])
@pytest.mark.parametrize("empirical", [False, True])
def test_factors_are_exact_for_one_datum(kind: str, empirical: bool) -> None:
    case = {"categorical": models.mlp, "gaussian": models.mlp_gaussian, "bernoulli": models.mlp_bernoulli}[kind]()
    x, t = case.x[:1], case.t[:1]
    columns = (oracles.empirical_columns if empirical else oracles.exact_columns)(kind, t)
    C = oracles.fisher_from_columns(case.model, x, columns, 1)
    for layer in ("0", "2"):
        ((A, B),) = oracles.kfac_factors(case.model, x, layer, columns, 1)
        close(oracles.kron(B, A), joint_block(case, C, layer), 1e-12)


@pytest.mark.parametrize("r, pooled", [(None, False), (3, False), (3, True)])
def test_factors_are_exact_for_deep_linear_nets(r: int | None, pooled: bool) -> None:
    """Per-position loss: expand is exact and reduce is not; pooled output: the other way round; no sharing: both."""
    case = models.deep_linear(r, pooled)
    C = oracles.loss_ggn(case.model, case.x, loss_on(case))
    columns, terms = oracles.exact_columns("gaussian", case.t, variance=1.0), case.t.numel() / case.t.shape[-1]
    for layer in ("layers.0", "layers.1", "layers.2"):
        for sharing in ("expand", "reduce"):
            ((A, B),) = oracles.kfac_factors(case.model, case.x, layer, columns, terms, sharing=sharing)
            error = oracles.relative_error(oracles.kron(B, A), joint_block(case, C, layer))
            assert error < EXACT if r is None or (sharing == "reduce") == pooled else error > 0.01


def test_factors_of_groups_are_those_of_separate_convolutions() -> None:
    case = models.convolution(2, groups=2, padding=1)
    columns = oracles.exact_columns("categorical", case.t)
    whole = models.ConvNet(nn.Conv2d(4, 4, models.KERNEL[2], padding=1), 4, models.IMAGE[2]).double()
    found = oracles.kfac_factors(case.model, case.x, "convolution", columns, 3)
    conv = case.model.convolution
    with torch.no_grad():  # a dense convolution with a block-diagonal kernel is the same function
        dense = torch.zeros(4, 4, *models.KERNEL[2], dtype=torch.float64)
        dense[:2, :2], dense[2:, 2:] = conv.weight[:2], conv.weight[2:]
        whole.convolution.weight.copy_(dense)
        whole.convolution.bias.copy_(conv.bias)
    whole.head, whole.pool = case.model.head, case.model.pool
    ((A, B),) = oracles.kfac_factors(whole, case.x, "convolution", columns, 3)
    half = (len(A) - 1) // 2
    for group, factors in enumerate(found):
        rows = torch.cat([torch.arange(half) + group * half, torch.tensor([len(A) - 1])])
        close(factors.A, oracles.reorder(A, rows))
        close(factors.B, oracles.reorder(B, torch.arange(2) + 2 * group))


def test_factors_of_an_embedding_are_those_of_a_linear_on_one_hot() -> None:
    case = models.tagger("last")
    columns = oracles.exact_columns("categorical", case.t)
    ((A, B),) = oracles.kfac_factors(case.model, case.x, "embedding", columns, case.t.numel())
    close(A, torch.diag(torch.bincount(case.x.flatten(), minlength=7).double() / case.x.numel()))
    linear = nn.Linear(7, 3, bias=False).double()
    linear.weight = nn.Parameter(case.model.embedding.weight.detach().mT.contiguous())
    case.model.embedding = linear
    ((A1, B1),) = oracles.kfac_factors(case.model, F.one_hot(case.x, 7).double(), "embedding", columns, case.t.numel())
    close(A1, A)
    close(B1, B)


def test_factors_do_not_mind_in_place_activations_and_count_both_calls() -> None:
    found = []
    for inplace in (False, True):
        case = models.mlp_relu(inplace)
        found.append(oracles.kfac_factors(case.model, case.x, "0", oracles.exact_columns("categorical", case.t), 6)[0])
    assert torch.equal(found[0].A, found[1].A) and torch.equal(found[0].B, found[1].B)
    case = models.called_twice()
    ((A, _),) = oracles.kfac_factors(case.model, case.x, "shared", oracles.exact_columns("categorical", case.t), 5)
    a = torch.cat([case.x, torch.tanh(case.model.shared(case.x))]).detach()
    close(A[:4, :4], a.mT @ a / 10)
    assert case.model.shared.weight.grad is None and not case.model.shared._forward_hooks


# --- linear algebra and trajectories --------------------------------------------------------------------------------------


def psd(n: int, seed: int = 0) -> Tensor:
    X = torch.randn(n, 2 * n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return X @ X.mT / n


def test_linear_algebra() -> None:
    A, B, V = psd(3), psd(2, 1), torch.randn(2, 3, dtype=torch.float64)
    close(oracles.kron(B, A), torch.kron(B, A), 1e-15)
    close((oracles.kron(B, A) @ V.reshape(-1)).view_as(V), B @ V @ A.mT, 1e-14)
    R = oracles.matrix_power(A, -0.25)
    close(torch.linalg.matrix_power(R, 4) @ A, torch.eye(3, dtype=torch.float64))
    C = psd(6, 2)
    close((C + 0.1 * torch.eye(6, dtype=torch.float64)) @ oracles.tikhonov_solve(C, 0.1, V).reshape(-1), V.reshape(-1))
    blocks = oracles.unit_blocks(C, 2, 3)
    close(torch.block_diag(*blocks), oracles.block_diagonal(C, [slice(0, 3), slice(3, 6)]), 1e-15)
    wb = torch.arange(6.0)  # W = [[0, 1], [2, 3]], b = [4, 5]
    assert wb[oracles.joint_order(2, 2)].tolist() == [0, 1, 4, 2, 3, 5]


def gradients(*shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(30)]


@pytest.mark.parametrize(
    "step, optimizer",
    [
        (oracles.adam_step, lambda p: torch.optim.Adam(p, lr=0.01)),
        (oracles.adagrad_step, lambda p: torch.optim.Adagrad(p, lr=0.01)),
    ],
)
def test_element_wise_trajectories_are_torchs(step: Callable[..., Tensor], optimizer: Callable[..., Any]) -> None:
    w, state = torch.zeros(3, 2, dtype=torch.float64), {}
    p = nn.Parameter(w.clone())
    torch_optimizer = optimizer([p])
    for g in gradients(3, 2):
        p.grad = g.clone()
        torch_optimizer.step()
        w = step(w, g, state, lr=0.01)
    close(w, p.detach(), 1e-12)


def test_shampoo_trajectory() -> None:
    """Order k equals the dense Kronecker root; a bias-corrected mean at its first step is the sum's; scale does not matter."""
    for shape in ((5,), (4, 3), (3, 2, 4)):
        sums, means = {}, {}
        factors = [torch.zeros(d, d, dtype=torch.float64) for d in shape]
        for t, g in enumerate(gradients(*shape)):
            U = oracles.shampoo_direction(g, sums)
            mean = oracles.shampoo_direction(g, means, decay=0.9)
            X = torch.ones(1, 1, dtype=torch.float64)
            for axis, H in enumerate(factors):
                H += torch.tensordot(g, g, dims=([d for d in range(g.dim()) if d != axis],) * 2)
                ridge = 1e-6 * torch.linalg.eigvalsh(H)[-1] * torch.eye(len(H), dtype=torch.float64)
                X = torch.kron(X, oracles.matrix_power(H + ridge, -1 / (2 * g.dim())))
            close(U.reshape(-1), X @ g.reshape(-1), 1e-9)
            if t == 0:
                close(mean, U, 1e-9)
                close(oracles.shampoo_direction(100 * g, {}), U, 1e-6)
    close(averaged_by_recursion(gradients(2, 2), 0.9), averaged_by_history(gradients(2, 2), 0.9), 1e-12)


def averaged_by_history(values: list[Tensor], decay: float) -> Tensor:
    state: oracles.State = {}
    return [oracles.averaged(state, "S", value, decay) for value in values][-1]


def averaged_by_recursion(values: list[Tensor], decay: float) -> Tensor:
    S = torch.zeros_like(values[0])
    for value in values:
        S = decay * S + (1 - decay) * value
    return S / (1 - decay ** len(values))


def test_kfac_step() -> None:
    A, B, g = psd(4), psd(3, 1), torch.randn(3, 4, dtype=torch.float64)
    w = torch.zeros_like(g)
    s, U = torch.linalg.eigh(A)
    q, V = torch.linalg.eigh(B)
    expected = V @ ((V.mT @ g @ U) / (q[:, None] * s + 0.3)) @ U.mT
    close(oracles.kfac_direction(g, A, B, damping=0.3, split="exact"), expected)
    close(oracles.kfac_direction(g, A, B, damping=1e-12), oracles.kfac_direction(g, A, B, damping=1e-12, split="exact"), 1e-4)
    assert oracles.damping_split(A, A, 0.25) == (0.5, 0.5)
    scaled = oracles.kfac_direction(g, 100 * A, B / 100, damping=0.3)
    close(scaled, oracles.kfac_direction(g, A, B, damping=0.3))
    state: oracles.State = {}
    for decay in (None, 0.0, 0.95):
        found = oracles.kfac_step(w, g, oracles.Factors(A, B), {}, lr=1.0, damping=0.3, decay=decay)
        close(found, -oracles.kfac_direction(g, A, B, damping=0.3))
    oracles.kfac_step(w, g, oracles.Factors(B.new_zeros(4, 4), B), state, lr=1.0, damping=0.3, decay=0.0)
    found = oracles.kfac_step(w, g, oracles.Factors(A, B), state, lr=1.0, damping=0.3, decay=0.0)
    close(found, -oracles.kfac_direction(g, A, B, damping=0.3))


# --- the zoo --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_case_is_repeatable_and_leaves_the_random_state(name: str) -> None:
    before = torch.random.get_rng_state()
    first, second = ZOO[name](), ZOO[name]()
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first.run(), second.run())
    assert all(p.dtype == torch.float64 for p in first.model.parameters())


def test_twins_of_the_zoo() -> None:
    """Checkpoints, in-place activations, output structures and layouts do not change the loss."""
    twins = [["checkpoint_none", "checkpoint_reentrant", "checkpoint_saved"], ["mlp_relu", "mlp_relu_inplace"]]
    twins += [["structured_tuple", "structured_dict", "structured_dataclass"], ["tagger_torch", "tagger_last", "tagger_flat"]]
    for names in twins:
        losses = [float(ZOO[name]().run().detach()) for name in names]
        assert max(losses) - min(losses) < 1e-14
    for form in ("tuple", "dict", "dataclass"):
        case = models.structured(form)
        assert torch.equal(models.loss_of(case.model(case.x, case.t)), case.run())
