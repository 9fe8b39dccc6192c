"""What the instrument takes, leaves behind, tells and writes."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradmaker
from gradmaker.fidelity.catalogue import EXACT, MEASURES
from gradmaker.fidelity.layers import WHOLE
from gradmaker.fidelity.line_search import best_step
from gradmaker.fidelity.run import thinned
from gradmaker.fidelity.values import Spectrum
from tests import models


def measured(approximations: Any, **options: Any) -> gradmaker.Fidelity:
    case = models.mlp()
    return gradmaker.fidelity(case.model, case.loss, (case.x, case.t), approximations, **options)


# ------------------------------------------------------------------ inputs
def test_all_forms_of_approximations() -> None:
    from gradmaker.curvature import FisherExact
    from gradmaker.representations import Diagonal
    from gradmaker.solvers import Division

    case = models.mlp()
    triple = gradmaker.Triple(FisherExact(), Diagonal(granularity="layer"), Division(power=-1.0, damping=1e-3))
    maker = gradmaker.KflrGradientMaker(case.model)
    loss = maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x), case.t)
    maker.forward_and_backward()
    assert loss is not None
    given = [
        "kflr",
        {"method": "kfac", "damping": 0.1},
        gradmaker.EkfacGradientConfig(),
        triple,
        ("mine", "kfac"),
        maker,
        "kfac",
        "kfac",
    ]
    result = gradmaker.fidelity(case.model, case.loss, (case.x, case.t), given)
    assert result.labels == ["kflr", "kfac damping=0.1", "ekfac", "custom", "mine", "kflr (held)", "kfac", "kfac 2"]
    for measure in ("error", "inverse", "cosine", "length"):
        assert result.value("kflr (held)", measure) == pytest.approx(result.value("kflr", measure), rel=1e-9)


@pytest.mark.parametrize("form", ["pair", "list", "keywords", "tuple", "own_loss", "loader"])
def test_all_forms_of_batches(form: str) -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, a: Tensor, b: Tensor | None = None, t: Tensor | None = None) -> Any:
            z = self.layer(a if b is None else a + b)
            return z if t is None else type("Output", (), {"loss": F.cross_entropy(z, t), "logits": z})()

    torch.manual_seed(0)
    model, a, t = Pairs().double(), torch.randn(5, 3, dtype=torch.float64), torch.randint(2, (5,))
    batches: Any = {
        "pair": (a, t),
        "list": [(a, t)],
        "keywords": [({"a": a / 2, "b": a / 2}, t)],
        "tuple": [((a / 2, a / 2), t)],
        "own_loss": {"a": a, "t": t},
        "loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(a, t), batch_size=5),
    }[form]
    loss = None if form == "own_loss" else F.cross_entropy
    result = gradmaker.fidelity(model, loss, batches, "kflr")
    expected = gradmaker.fidelity(model, F.cross_entropy, (a, t), "kflr")
    for measure in ("error", "cosine", "decrease"):
        assert result.value("kflr", measure) == pytest.approx(expected.value("kflr", measure), rel=1e-9)
        assert result.value("kflr", measure, "layer") == pytest.approx(expected.value("kflr", measure, "layer"), rel=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"approximations": "kfak"}, "kfac"),
        ({"approximations": "gradient"}, "no curvature matrix"),
        ({"approximations": []}, "got none"),
        ({"approximations": [("a", "kfac"), ("a", "kflr")]}, "given twice"),
        ({"approximations": 3.0}, "float"),
        ({"batches": torch.zeros(3)}, "a pair"),
        ({"batches": []}, "empty"),
        ({"reference": "fisher"}, "fisher_exact"),
        ({"seeds": 0}, "seeds"),
        ({"layers": ["nothing"]}, "names none"),
        ({"loss": lambda y, t: y}, "one element"),
        ({"loss": 3}, "loss: expected"),
        ({"loss": lambda y, t: y.square().sum()}, "recognised loss"),
    ],
)
def test_errors_name_what_is_legal(change: dict[str, Any], message: str) -> None:
    case = models.mlp()
    given: dict[str, Any] = {"loss": case.loss, "batches": (case.x, case.t), "approximations": "kfac", **change}
    with pytest.raises((ValueError, TypeError), match=message):
        gradmaker.fidelity(case.model, **given)


def test_no_statistics_no_measure() -> None:
    case = models.mlp()
    maker = gradmaker.KflrGradientMaker(case.model)
    with pytest.raises(ValueError, match="has to have made a step"):
        gradmaker.fidelity(case.model, case.loss, (case.x, case.t), maker)


# ------------------------------------------------------------------ nothing is left behind
def test_nothing_is_left_behind() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    x, t = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
    F.cross_entropy(model(x), t).backward()
    gradients = [p.grad for p in model.parameters()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    kept, state = [None if g is None else g.clone() for g in gradients], torch.get_rng_state()
    gradmaker.fidelity(model, F.cross_entropy, (x, t), ["kfac", "adam"])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(g is None or torch.equal(g, k) for g, k in zip(gradients, kept, strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_an_attached_maker_does_not_see_it() -> None:
    """The training with a measurement in between is bitwise the training without."""
    ends = []
    for watched in (False, True):
        case = models.mlp()
        optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
        maker = gradmaker.KfacGradientMaker(case.model).attach(optimizer)
        along = gradmaker.fidelity_along(
            case.model, case.loss, (case.x, case.t), {"held": maker, "fresh": "kfac"}, at=[1, 3], line_searches="none"
        )
        for step in range(1, 5):
            optimizer.zero_grad()
            case.run().backward()
            if watched and step > 1:
                along(step - 1)
            optimizer.step()
        ends.append([p.detach().clone() for p in case.model.parameters()])
        if watched:
            assert along.result.steps == [1, 3]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


# ------------------------------------------------------------------ along a training
def test_stale_statistics_are_seen() -> None:
    """A maker that measures once holds the matrix of the start: its error grows, that of a fresh measurement does not."""
    case = models.mlp()
    maker = gradmaker.from_config(case.model, {"method": "full_ng", "fisher": "FisherExact", "curvature_interval": 100})
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.02)
    fresh = {"method": "full_ng", "fisher": "FisherExact"}
    along = gradmaker.fidelity_along(case.model, case.loss, (case.x, case.t), {"held": maker, "fresh": fresh}, at=[0, 20])
    with pytest.raises(RuntimeError, match="nothing was measured"):
        _ = along.result
    for step in range(21):
        maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x), case.t)
        maker.forward_and_backward()
        along(step)
        optimizer.step()
    result = along.result
    assert result.steps == [0, 20]
    assert result.value("held", "error", step=0) < 1e-10 > result.value("fresh", "error", step=20)
    assert result.value("held", "error", step=20) > 0.05
    assert result.value("held", "cosine", step=20) < result.value("fresh", "cosine", step=20)


# ------------------------------------------------------------------ the result
def test_batches_and_seeds_give_error_bars() -> None:
    case = models.mlp()
    batches = [(case.x[:3], case.t[:3]), (case.x[2:], case.t[2:])]
    result = gradmaker.fidelity(case.model, case.loss, batches, ["kfac", "kflr"], seeds=3)
    sampled, exact = result.mean("kfac", "error"), result.mean("kflr", "error")
    assert sampled is not None and exact is not None
    assert (sampled.runs, exact.runs) == (6, 2)  # another seed gives KFLR nothing new
    own = [v for v in result.values if (v.approximation, v.layer, v.measure) == ("kfac", WHOLE, "error")]
    values = torch.tensor([[v.value for v in own if v.batch == k] for k in (0, 1)], dtype=torch.float64)
    assert sampled.value == pytest.approx(float(values.mean()))
    assert sampled.error == pytest.approx(float(values.mean(1).std() / 2**0.5))  # the seeds of a batch share its data


def test_results_are_joined() -> None:
    one, other = measured(["kfac"], seed=0), measured(["kfac"], seed=1)
    moved = replace(other, values=[replace(v, value=v.value + 1) for v in other.values])
    both = one.joined([moved])
    found = both.mean("kfac", "error")
    assert found is not None and found.runs == 2 and found.error > 0.1 and {v.batch for v in both.values} == {0, 1}
    assert {v.batch for v in one.joined([moved.at_step(5)]).values} == {0}
    for bad, told in (
        (one, "given twice"),
        (measured(["kfac"], reference="ggn"), "different reference: fisher_exact and ggn"),
        (measured(["kfac"], damping=0.5), "different damping: None and 0.5"),
        (measured(["kflr"]), "other layers or approximations"),
    ):
        with pytest.raises(ValueError, match=told):
            one.joined([bad])


def test_json_holds_all_of_it() -> None:
    result = measured(["kfac", "adam", "hessian_free"])
    again = gradmaker.Fidelity.from_json(result.to_json())
    assert again.to_json() == result.to_json()
    assert again.table() == result.table() == str(result)
    with pytest.raises(ValueError, match="to_json"):
        gradmaker.Fidelity.from_json('{"format": 0}')


def test_tables() -> None:
    result = measured(["kfac", "adam"])
    text = result.table()
    assert "kfac" in text and "between layers" not in text and EXACT in text
    for measure in MEASURES:
        assert result.table(measure).startswith(MEASURES[measure].title)
    with pytest.raises(ValueError, match="cosine"):
        result.table("cosin")
    with pytest.raises(KeyError, match="not measured"):
        result.value("kfac", "residual")


def test_traps_are_told() -> None:
    forward = {"method": "kfac", "fisher": "FisherForward"}
    result = measured({"ekfac": "ekfac", "forward": forward, "adam": "adam", "cg": "hessian_free"})
    told = "\n".join(result.notes)
    for part in (
        "ekfac: targets are sampled, 1 for each",
        "ekfac: after one measurement",
        "forward: FisherForward has the scale",
        "adam: P approximates C^(-0.5)",
        "cg: it holds products of its own step alone",
    ):
        assert part in told
    assert "after one measurement" not in "\n".join(measured("ekfac", repeats=2).notes)


def test_ekfac_after_one_measurement_is_kflr() -> None:
    ekfac = {"method": "ekfac", "fisher": "FisherExact"}
    once, twice = measured(["kflr", ("ekfac", ekfac)]), measured(["kflr", ("ekfac", ekfac)], repeats=2)
    assert once.value("ekfac", "error") == pytest.approx(once.value("kflr", "error"), rel=1e-9)
    assert twice.value("ekfac", "error") < twice.value("kflr", "error")


def test_thinned_keeps_mass_and_moment() -> None:
    nodes = torch.rand(1000, dtype=torch.float64).sort()[0]
    full = Spectrum("a", WHOLE, tuple(nodes.tolist()), (1e-3,) * 1000)
    few = thinned(full)
    assert len(few.nodes) == 256
    assert few.nodes[-128:] == full.nodes[-128:]
    assert sum(few.weights) == pytest.approx(1)
    assert sum(x * w for x, w in zip(few.nodes, few.weights, strict=True)) == pytest.approx(float(nodes.mean()))


@pytest.mark.parametrize("start", [1e-3, 0.4, 0.5, 30.0, 1e3])
def test_best_step(start: float) -> None:
    gain, step = best_step(lambda x: (x - 0.7) ** 2, start, 0.49)
    assert (gain, step) == pytest.approx((0.49, 0.7), abs=1e-9)


def test_best_step_where_none_helps() -> None:
    assert best_step(lambda x: 1 + x, 1.0, 1.0) == (0.0, 0.0)
    assert best_step(lambda x: float("nan"), 1.0, 1.0) == (0.0, 0.0)
    assert best_step(lambda x: x, 0.0, 1.0) == (0.0, 0.0)


def test_measures_need_no_extra() -> None:
    extras = "{'typer', 'jinja2', 'rich', 'matplotlib', 'vl_convert'}"
    code = f"import sys, gradmaker; gradmaker.fidelity; print({extras} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


# ------------------------------------------------------------------ refused rows
def test_a_refused_row_says_why_and_ends_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options that are illegal, a method without a matrix, and a step that fails, beside a row that is measured."""
    from gradmaker.fidelity import instrument

    whole = instrument.measured_of

    def failing(one: Any, *given: Any) -> Any:
        if one.label == "kflr":
            raise RuntimeError("no step")
        return whole(one, *given)

    monkeypatch.setattr(instrument, "measured_of", failing)
    result = measured([{"method": "kfac", "damping": -1.0}, "gradient", "kflr", "kfac"])
    assert result.labels == ["kfac damping=-1.0", "gradient", "kflr", "kfac"]
    assert 0 < result.value("kfac", "error") and {v.approximation for v in result.values} == {"kfac", EXACT, "layer blocks"}
    for label, reason in (("kfac damping=-1.0", "damping=-1.0"), ("gradient", "no curvature matrix"), ("kflr", "no step")):
        assert any(note.startswith(f"{label}: refused: ") and reason in note for note in result.notes)
        assert f"\n{label} " in str(result)
    assert gradmaker.Fidelity.from_json(result.to_json()).labels == result.labels
