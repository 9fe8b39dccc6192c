"""The report, the command, and the figures of one user who measured by hand."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

import gradmaker
from gradmaker.commands.app import app
from gradmaker.fidelity.page import document
from gradmaker.fidelity.tables import answer
from tests import models, oracles


def test_report_of_a_training(tmp_path: Path) -> None:
    case = models.mlp()
    along = gradmaker.fidelity_along(case.model, case.loss, (case.x, case.t), ["kfac", "adam", "hessian_free"], at=[0, 5])
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    for step in range(6):
        along(step)
        optimizer.zero_grad()
        case.run().backward()
        optimizer.step()
    paths = along.result.write(tmp_path / "report")
    html = paths["html"].read_text(encoding="utf-8")
    names = {figure.name for figure in document(along.result).figures}
    assert {"cost_error_scaled", "layers_error_scaled_map", "layers_cosine_map", "spectra", "steps_cosine", "coupling"} <= names
    assert all((tmp_path / "report" / "figures" / f"{name}.{kind}").is_file() for name in names for kind in ("svg", "pdf"))
    assert "kfac" in html and "targets are sampled" in html and "|Ĉ - C|_F / |C|_F" in html
    again = gradmaker.Fidelity.from_json(paths["result"])
    assert again.table() == along.result.table()
    assert document(again) == document(along.result)


def test_answer_says_which_is_nearest() -> None:
    case = models.mlp()
    exact = {"method": "layer_ng", "fisher": "FisherExact"}
    result = gradmaker.fidelity(case.model, case.loss, (case.x, case.t), [("layers", exact), "kfac"], line_searches="none")
    first, *others = document(result).answer
    assert first.startswith("layers is nearest to the reference")
    share = 100 * result.value("reference", "off_diagonal")
    assert f"{share:.0f} % of the squared norm" in others[-1]


def test_answer_compares_cosines_with_one_direction_alone() -> None:
    case = models.mlp()
    two = [{"method": "kfac", "damping": 1e-2}, {"method": "kflr", "damping": 1e-2}]
    of = lambda given, **options: gradmaker.fidelity(case.model, case.loss, (case.x, case.t), given, **options)  # noqa: E731
    assert "nearest to the exact one" in " ".join(answer(of(two)))
    assert "nearest to the exact one" in " ".join(answer(of(["kfac", {"method": "kflr", "damping": 0.5}], damping=1e-2)))
    for given in ([two[0], "adam"], [two[0], {"method": "kflr", "damping": 0.5}]):
        told = " ".join(answer(of(given)))
        assert "nearest to the exact one" not in told and "exact direction of its own power and damping: kfac" in told
    both = of(two).joined([of(two).at_step(7)])
    assert answer(both)[-1] == "All of this is of step 7, as are tables and spectra."


def test_command_tells_of_batches_that_are_missing(tmp_path: Path) -> None:
    options = ["--hidden", "3", "--batch-size", "800", "--steps", "0", "--out", str(tmp_path)]
    found = CliRunner().invoke(app, ["fidelity", "diag_ng", *options])
    assert found.exit_code == 0 and "an epoch of the data has 1 of 2 batches of 800" in found.output


def test_command_writes_a_report(tmp_path: Path) -> None:
    options = ["--hidden", "3", "--batch-size", "16", "--batches", "1", "--steps", "0", "--steps", "2", "--out", str(tmp_path)]
    found = CliRunner().invoke(app, ["fidelity", "kfac", "diag_ng", *options])
    assert found.exit_code == 0, found.output
    assert "step 2" in found.output and "report.html" in found.output
    assert gradmaker.Fidelity.from_json(tmp_path / "fidelity.json").steps == [0, 2]


@pytest.mark.parametrize("given", [["kfak"], ["kfac", "--data", "digit"], ["nothing.yaml"], ["kfac", "--reference", "fisher"]])
def test_command_says_what_is_wrong(given: list[str], tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["fidelity", *given, "--out", str(tmp_path / "none")])
    assert found.exit_code == 2
    assert found.output.startswith("error: ") and found.output.count("\n") == 1
    assert not (tmp_path / "none").exists()


# ------------------------------------------------------------------ by hand
def digits() -> tuple[nn.Sequential, Tensor, Tensor]:
    """A tanh network 64-16-10 after 200 steps of Adam on scikit-learn's digits, with 256 of them."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, t = torch.as_tensor(images / 16, dtype=torch.float64), torch.as_tensor(labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(200):
            rows = torch.randint(len(x), (128,))
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), t[rows]).backward()
            optimizer.step()
    return model, x[:256], t[:256]


def by_hand(model: nn.Sequential, x: Tensor, t: Tensor, layer: int, name: str) -> tuple[float, float]:
    """Relative error and cosine of one layer: its inputs, and the Hessians of the losses in its outputs, by formulas."""
    weights = [(model[k].weight.detach(), model[k].bias.detach()) for k in (0, 2)]
    h = (x @ weights[0][0].mT + weights[0][1]).tanh()
    p = (h @ weights[1][0].mT + weights[1][1]).softmax(-1)
    inputs = torch.cat([x if layer == 0 else h, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    J = weights[1][0] * (1 - h.square()).unsqueeze(1) if layer == 0 else torch.eye(10, dtype=x.dtype).expand(len(x), 10, 10)
    H = J.mT @ (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)) @ J  # (n, o, o)
    n, o, i = len(x), H.shape[1], inputs.shape[1]
    C = torch.einsum("noq,ni,nj->oiqj", H, inputs, inputs).reshape(o * i, o * i) / n
    slopes = torch.einsum("nc,nco->no", p - F.one_hot(t, 10), J)
    g = (slopes.mT @ inputs / n).reshape(-1)
    A, B = inputs.mT @ inputs / n, H.mean(0)
    approximate = oracles.kron(B, A) if name == "kflr" else C.diag().diag()
    d = oracles.kfac_direction(g.view(o, i), A, B, damping=1e-3).reshape(-1) if name == "kflr" else g / (C.diag() + 1e-3)
    exact = oracles.tikhonov_solve(C, 1e-3, g)
    return oracles.relative_error(approximate, C), float(d @ exact / (d.norm() * exact.norm()))


def test_five_lines_on_digits() -> None:
    """Near to what a newcomer measured by hand, once, at an unknown step of a training of such a network."""
    model, x, t = digits()
    given = ["kfac", "kflr", ("diagonal", {"method": "diag_ng", "fisher": "FisherExact"})]
    result = gradmaker.fidelity(model, F.cross_entropy, (x, t), given, seeds=6, line_searches="none")
    for label in ("kflr", "diagonal"):
        for layer in ("0", "2"):
            error, cosine = by_hand(model, x, t, int(layer), label)
            assert result.value(label, "error", layer) == pytest.approx(error, rel=1e-8)
            assert result.value(label, "cosine", layer) == pytest.approx(cosine, rel=1e-6)
    reported = {"kfac": (0.67, 0.86), "kflr": (0.44, 0.79), "diagonal": (0.99, 0.93)}
    for label, pair in reported.items():
        for layer, value in zip(("0", "2"), pair, strict=True):
            assert result.value(label, "error", layer) == pytest.approx(value, abs=0.1)
    sampled = result.mean("kfac", "error", "0")
    assert sampled is not None and sampled.runs == 6 and 0 < sampled.error < 0.1 and math.isfinite(sampled.value)
