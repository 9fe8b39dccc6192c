"""Tables that are the weight of embeddings and of heads: K-FAC's factors of both uses, and what becomes of other uses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from gradmaker import METHODS, from_config
from gradmaker.curvature import FisherEmp, FisherExact, FisherForward, FisherMC
from gradmaker.curvature.tied import Tied
from gradmaker.errors import SelfCheckWarning
from gradmaker.reports.verification.passes import measure as record
from gradmaker.representations import Dense, Kron, Representation
from tests import oracles
from tests.measure import EXACT, blocks, custom, ggn, measure
from tests.models import Case, build_tokens

V, D, N, R = 7, 4, 5, 3


class Language(nn.Module):
    """One label a token, from a vocabulary of `V`. ``uses``: which of its two layers the table serves in a pass."""

    def __init__(self, bias: bool = False, uses: str = "both", tie: bool = True) -> None:
        super().__init__()
        self.wte, self.hidden, self.head = nn.Embedding(V, D), nn.Linear(D, D), nn.Linear(D, V, bias=bias)
        self.out, self.uses = nn.Linear(D, V).requires_grad_(False), uses
        if tie:
            self.head.weight = self.wte.weight
        else:
            self.head.weight.data.copy_(self.wte.weight.data)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.wte(tokens) if self.uses != "head" else F.one_hot(tokens, V).double()[..., :D]
        h = torch.tanh(self.hidden(h))
        z: Tensor = self.head(h) if self.uses != "lookup" else self.out(h)
        return z


def tags(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), t.flatten())


def language(make: Callable[[], nn.Module] = Language) -> Case:
    case = build_tokens(make, N, R, V, tags, tags=True)
    return case._replace(t=case.t + (case.x + 2 * torch.arange(R)) % 3)  # all of the vocabulary


def factors(case: Case, layer: str, **options: Any) -> oracles.Factors:
    """Of one use, by loops over single examples."""
    columns = oracles.exact_columns("categorical", case.t)
    (pair,) = oracles.kfac_factors(case.model, case.x, layer, columns, case.t.numel(), **options)
    return pair


def nearest(lookup: oracles.Factors, head: oracles.Factors) -> Tensor:
    C = oracles.kron(lookup.A, lookup.B) + oracles.kron(head.B, head.A)
    return oracles.kron(*oracles.nearest_kronecker(C, V))


def cut(B: Tensor, size: int) -> Tensor:
    """Equal blocks along the diagonal."""
    block = torch.arange(len(B)) // -(-len(B) // -(-len(B) // size))
    return B * (block[:, None] == block)


def inputs(make: Callable[[], nn.Module]) -> Tensor:
    """The input factor of the head, without its bias."""
    return factors(language(make), "head").A[:D, :D]


# ------------------------------------------------------------------ the two uses
def test_rows_are_the_jacobians_of_examples() -> None:
    """At a random cotangent, by `torch.func`."""
    case = language()
    maker = custom(case.model, FisherExact(), Kron())
    y = maker.setup_model_call(case.model, case.x)
    maker.setup_loss_call(case.loss, y, case.t)
    maker.forward_and_backward()
    torch.manual_seed(0)
    found = record(maker)
    evidence = found.evidence["wte.weight"]
    assert isinstance(evidence, Tied) and len(evidence.parts) == 2
    named = {k: p.detach() for k, p in case.model.named_parameters()}

    def output(weight: Tensor, x: Tensor) -> Tensor:
        z: Tensor = functional_call(case.model, {**named, "wte.weight": weight, "head.weight": weight}, (x.unsqueeze(0),))
        return z[0]

    J = torch.stack([jacrev(output)(named["wte.weight"], x) for x in case.x])  # (n, r, V, V, d)
    assert evidence.lookup is not None and evidence.head is not None
    u = evidence.head.gradients[0, 0]  # the cotangent, as the head is the last layer  # (n, r, V)
    expected = torch.einsum("nrv,nrvwd->nwd", u, J)
    assert oracles.relative_error(evidence.rows()[:, 0], expected) < 1e-12
    z = torch.randn(1, N, dtype=torch.float64)
    v = torch.randn(1, V, D, dtype=torch.float64)
    assert oracles.relative_error(evidence.combine(z), torch.einsum("gn,nwd->gwd", z, expected)) < 1e-12
    assert oracles.relative_error(evidence.project(v), torch.einsum("gwd,nwd->gn", v, expected)) < 1e-12


SIZES: dict[str, tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = {
    "dense": ({}, lambda B: B),
    "diagonal": ({"max_dim": 5}, lambda B: B.diagonal().diag()),
    "blocks": ({"max_dim": 5, "wide_sides": "blocks"}, lambda B: cut(B, 5)),
}


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("size", SIZES)
def test_factors_are_the_nearest_product(size: str, sharing: str) -> None:
    """The factor of the logits in every form; those of the lookups are expanded whatever is said."""
    options, form = SIZES[size]
    representation = Kron(sharing=sharing, wide_sides=options.get("wide_sides", "diagonal"))  # type: ignore[arg-type]
    maker = measure(language(), FisherExact(), representation, max_dim=options.get("max_dim", 99))
    lookup, head = factors(language(), "wte"), factors(language(), "head", sharing=sharing)
    expected = nearest(lookup, head._replace(B=form(head.B)))
    assert oracles.relative_error(blocks(maker)["wte.weight"][0][0], expected) < EXACT


def test_one_use_alone_is_that_layer() -> None:
    """In a pass without the other use, which is then no part of the curvature, and after which it is forgotten."""
    for uses, layer in (("lookup", "wte"), ("head", "head")):
        make = partial(Language, uses=uses)
        alone = blocks(measure(language(partial(make, tie=False)), FisherExact(), Kron()))[f"{layer}.weight"][0]
        tied = blocks(measure(language(make), FisherExact(), Kron()))["wte.weight"][0]
        assert oracles.relative_error(tied, alone) < EXACT, uses


def test_uses_that_come_and_go_weigh_as_steps() -> None:
    """Averages over a step with both uses and one with a lookup alone: the head has no curvature in the second."""
    case = language()
    maker = custom(case.model, FisherExact(), Kron(), decay=0.5)
    for uses in ("both", "lookup"):
        case.model.uses = uses  # type: ignore[assignment]
        y = maker.setup_model_call(case.model, case.x)
        maker.setup_loss_call(case.loss, y, case.t)
        maker.forward_and_backward()
    pairs = []
    for uses in ("both", "lookup"):
        twin = language(partial(Language, uses=uses))
        pairs.append((factors(twin, "wte"), factors(twin, "head") if uses == "both" else None))
    (first, head), (second, _) = pairs
    assert head is not None
    lookup = oracles.Factors((first.A + 2 * second.A) / 3, (first.B + 2 * second.B) / 3)
    expected = nearest(lookup, head._replace(B=head.B / 3))  # weights 1/4 and 1/2, over their sum
    assert oracles.relative_error(blocks(maker)["wte.weight"][0][0], expected) < EXACT


@pytest.mark.parametrize("fisher", [FisherExact(), FisherEmp()])
def test_micro_batches_add_up(fisher: Any) -> None:
    whole = blocks(measure(language(), fisher, Kron()))["wte.weight"][0]
    case = language()
    maker = custom(case.model, fisher, Kron())
    for part in (slice(0, 2), slice(2, N)):
        y = maker.setup_model_call(case.model, case.x[part])
        maker.setup_loss_call(case.loss, y, case.t[part])
        maker.accumulate(len(case.x[part]) / N)
    maker.precondition()
    assert oracles.relative_error(blocks(maker)["wte.weight"][0], whole) < EXACT


def test_damped_inverse_of_the_nearest_product() -> None:
    """The whole step, with the ``pi`` of both factors."""
    case = language()
    maker = METHODS["kfac"](case.model, METHODS["kfac"].Config(fisher=FisherExact(), damping=0.02))  # type: ignore[call-arg]
    y = maker.setup_model_call(case.model, case.x)
    maker.setup_loss_call(case.loss, y, case.t)
    maker.forward_and_backward()
    twin = language()
    C = nearest(factors(twin, "wte"), factors(twin, "head"))
    L, G = oracles.nearest_kronecker(C, V), torch.autograd.grad(twin.run(), twin.model.wte.weight)[0]  # type: ignore[arg-type]
    expected = oracles.kfac_direction(G, L[1], L[0], damping=0.02)
    assert oracles.relative_error(case.model.wte.weight.grad, expected) < EXACT  # type: ignore[union-attr,arg-type]


# ------------------------------------------------------------------ models in which tables are tied
class Seq2Seq(nn.Module):
    """As T5 and BART: one table for the encoder, the decoder and the head, as three modules; the head scales its input."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Embedding(V, D, padding_idx=0), nn.Embedding(V, D, padding_idx=0)
        self.mix, self.head = nn.Linear(2 * D, D), nn.Linear(D, V, bias=False)
        self.decoder.weight = self.head.weight = self.encoder.weight

    def forward(self, tokens: Tensor) -> Tensor:
        both = torch.cat([self.encoder(tokens), self.decoder(tokens.roll(1, 1))], -1)
        z: Tensor = self.head(torch.tanh(self.mix(both)) * D**-0.5)
        return z


def test_several_lookups_are_further_positions() -> None:
    maker = measure(language(Seq2Seq), FisherExact(), Kron())
    first, second = (factors(language(Seq2Seq), k) for k in ("encoder", "decoder"))
    A = (first.A + second.A) / 2  # equally many positions
    A = A / A.trace()  # rows of padding count as no input
    expected = nearest(oracles.Factors(A, first.B + second.B), factors(language(Seq2Seq), "head"))
    found = blocks(maker)
    assert set(found) == {"encoder.weight", "mix"}
    assert oracles.relative_error(found["encoder.weight"][0][0], expected) < EXACT


class Prompt(nn.Module):
    """The table is looked up for a prompt that is the same for all examples: that call has no axis of examples."""

    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.wte, self.hidden, self.head = nn.Embedding(V, D), nn.Linear(V, D), nn.Linear(D, V, bias=False)
        if tie:
            self.head.weight = self.wte.weight
        else:
            self.head.weight.data.copy_(self.wte.weight.data)

    def forward(self, tokens: Tensor) -> Tensor:
        z: Tensor = self.head(torch.tanh(self.hidden(F.one_hot(tokens, V).double()) * self.wte(torch.arange(R))))
        return z


@pytest.mark.filterwarnings("ignore::gradmaker.errors.SelfCheckWarning")
def test_a_use_without_an_axis_of_examples_sets_both_apart() -> None:
    """The factors of the two uses are those of separate layers, each of which has a right way of its own."""
    alone = blocks(measure(language(partial(Prompt, tie=False)), FisherExact(), Kron()))
    C = alone["wte.weight"][0][0] + alone["head.weight"][0][0]
    maker = measure(language(Prompt), FisherExact(), Kron())
    assert oracles.relative_error(blocks(maker)["wte.weight"][0][0], oracles.kron(*oracles.nearest_kronecker(C, V))) < EXACT


def test_a_bias_of_the_head_is_a_block_of_its_own() -> None:
    """As BERT's decoder has one."""
    make = partial(Language, bias=True)
    found = blocks(measure(language(make), FisherExact(), Kron()))
    assert set(found) == {"wte.weight", "hidden", "head.bias"}
    assert oracles.relative_error(found["head.bias"][0][0], factors(language(make), "head").B) < EXACT
    expected = nearest(factors(language(make), "wte"), factors(language(make), "head")._replace(A=inputs(make)))
    assert oracles.relative_error(found["wte.weight"][0][0], expected) < EXACT


def test_every_parameter_is_treated_by_kfac() -> None:
    for make in (Language, partial(Language, bias=True), Seq2Seq):
        maker: Any = METHODS["kfac"](language(make).model)
        assert not maker.plan.plain


@pytest.mark.parametrize("method", ["kfac", "kflr"])
@pytest.mark.parametrize("make", [Language, Seq2Seq])
def test_verify_passes(make: Callable[[], nn.Module], method: str) -> None:
    case = language(make)
    maker: Any = from_config(case.model, {"method": method})
    y = maker.setup_model_call(case.model, case.x)
    maker.setup_loss_call(case.loss, y, case.t)
    maker.forward_and_backward()
    assert maker.verify().passed


# ------------------------------------------------------------------ what other parts do
@pytest.mark.parametrize("representation", [Dense(granularity="layer"), Dense(granularity="full")])
def test_parts_that_do_not_hold_ties_measure_the_table_itself(representation: Representation) -> None:
    maker = measure(language(), FisherExact(), representation)
    oracle = ggn(language())
    for C, where in blocks(maker).values():
        assert oracles.relative_error(C, torch.stack([oracle[rows][:, rows] for rows in where])) < EXACT


@pytest.mark.parametrize("method", ["ekfac", "skfac", "foof"])
def test_methods_without_factors_of_both_uses_say_so(method: str) -> None:
    """The table is left to the fallback, as a parameter without a rule."""
    options: dict[str, Any] = {"method": "kfac", "fisher": FisherForward()} if method == "foof" else {"method": method}
    maker: Any = from_config(language().model, options)
    assert set(maker.plan.plain) == {"wte.weight"}


def test_a_frozen_or_ignored_table_has_no_block() -> None:
    case = language()
    case.model.wte.weight.requires_grad_(False)  # type: ignore[union-attr]
    assert set(blocks(measure(case, FisherExact(), Kron()))) == {"hidden"}
    assert set(blocks(measure(language(), FisherExact(), Kron(), ignore=("head",)))) == {"hidden"}


class Third(Language):
    """The table has a third use, which no call shows."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) + 0.1 * F.linear(self.wte(tokens), self.wte.weight)


def test_a_third_use_is_found() -> None:
    """The table then gets a site without a rule, of which K-FAC makes a plain parameter."""
    case = language(Third)
    maker: Any = METHODS["kfac"](case.model)
    y = maker.setup_model_call(case.model, case.x)
    maker.setup_loss_call(case.loss, y, case.t)
    with pytest.warns(SelfCheckWarning, match=r"wte\.weight: .*do not add up"):
        maker.forward_and_backward()
    assert set(maker.plan.plain) == {"wte.weight"}
    twin = language(Third)
    expected = torch.autograd.grad(twin.run(), twin.model.wte.weight)[0]  # type: ignore[arg-type]
    assert oracles.relative_error(case.model.wte.weight.grad, expected) < 1e-12  # type: ignore[union-attr,arg-type]


class Chosen(nn.Module):
    """A masked language model: its head sees the rows that are labelled, so that no pass shows whose they are."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.hidden, self.head = nn.Embedding(V, D), nn.Linear(D, D), nn.Linear(D, V, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = torch.tanh(self.hidden(self.wte(tokens)))
        z: Tensor = self.head((h + h.mean(1, keepdim=True))[tokens > 2])
        return z


def chosen() -> Case:
    case = language(Chosen)
    labels = case.t.masked_fill(case.x <= 2, -1)
    return case._replace(t=labels, loss=lambda z, t: F.cross_entropy(z, t[t >= 0]))


@pytest.mark.filterwarnings("ignore::gradmaker.errors.SelfCheckWarning")
def test_examples_that_are_evaluated_alone() -> None:
    """Both uses of examples with unequal numbers of rows, side by side, are the products of single passes."""
    maker, twin = measure(chosen(), FisherEmp(), Kron()), chosen()
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, args: Any, out: Tensor) -> None:
        out.retain_grad()
        kept.append((args[0].detach(), out))

    for module in (twin.model.wte, twin.model.head):  # type: ignore[union-attr]
        module.register_forward_hook(keep)  # type: ignore[operator,union-attr]
    total, M = [torch.zeros(d, d).double() for d in (V, D, D, V)], int((twin.t >= 0).sum())
    counts = [0, 0]
    for x, t in zip(twin.x, twin.t, strict=True):
        if bool((t >= 0).any()):
            kept.clear()
            F.cross_entropy(twin.model(x.unsqueeze(0)), t[t >= 0], reduction="sum").backward()
            (_, e), (a, h) = kept
            assert e.grad is not None and h.grad is not None
            for S, rows in zip(total, (F.one_hot(x, V).double(), e.grad[0] / M**0.5, a, h.grad / M**0.5), strict=True):
                S += rows.T @ rows
            counts = [counts[0] + R, counts[1] + len(a)]
    lookup, head = oracles.Factors(total[0] / counts[0], total[1]), oracles.Factors(total[2] / counts[1], total[3])
    assert counts[1] == M and counts[0] < twin.x.numel()
    assert oracles.relative_error(blocks(maker)["wte.weight"][0][0], nearest(lookup, head)) < EXACT


def test_a_state_is_resumed_bitwise() -> None:
    case = language()
    maker: Any = METHODS["kfac"](case.model)

    def step(maker: Any, case: Case) -> Tensor:
        case.model.zero_grad()
        y = maker.setup_model_call(case.model, case.x)
        maker.setup_loss_call(case.loss, y, case.t)
        maker.forward_and_backward()
        grad: Tensor = case.model.wte.weight.grad  # type: ignore[union-attr,assignment]
        return grad.clone()

    step(maker, case)
    saved = copy.deepcopy(maker.state_dict())
    then = step(maker, case)
    twin = language()
    other: Any = METHODS["kfac"](twin.model)
    other.load_state_dict(saved)
    assert torch.equal(step(other, twin), then)


def test_sampled_targets_are_unbiased() -> None:
    """Of both uses, by 5 standard errors: many draws against the exact matrix."""
    case = language()
    maker = measure(case, FisherMC(samples=2000), Kron())
    lookup, head = (factors(language(), k) for k in ("wte", "head"))
    (block,) = (b for b in maker.plan.blocks if b.name == "wte.weight")
    for key, expected in {"lookup_right": lookup.B, "left": head.B}.items():
        found = block.state[key][0] / block.state[f"{key}_mass"][0]
        assert oracles.relative_error(found, expected) < 0.1
