"""The parts and the method of ``examples/adding``: short files, right by dense oracles, legal wherever the library's are."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradmaker import METHODS, from_config, legality
from gradmaker.capture.rules.layers import RULES
from gradmaker.curvature import CURVATURES, FisherExact
from gradmaker.options.registry import Registry
from gradmaker.representations import REPRESENTATIONS, Dense, Kron
from gradmaker.solvers import SOLVERS
from tests import oracles
from tests.docs.test_docs import ROOT, script
from tests.docs.test_readme import blocks
from tests.measure import EXACT, compare, ggn, measure
from tests.models import Case, build
from tests.structure.private import uses
from tests.structure.sources import Source, parse, read

FOLDER = ROOT / "examples" / "adding"
ADDED: dict[str, tuple[Registry[Any], str]] = {
    "layer_rule": (RULES, "BilinearRule"),
    "curvature": (CURVATURES, "ClippedGradient"),
    "representation": (REPRESENTATIONS, "Adafactor"),
    "solver": (SOLVERS, "BlockDivision"),
    "method": (METHODS, "exact_small"),
}
"""By file: the registry, and the name in it."""
ROOT_OF = {"Division": {"power": -0.5, "damping": 1e-3}}
TRIPLES: dict[str, dict[str, Any]] = {
    "curvature": {"curvature": {"ClippedGradient": {"length": 0.1}}, "representation": "Diagonal", "solver": ROOT_OF},
    "representation": {"curvature": "BatchGradient", "representation": "Adafactor", "solver": ROOT_OF},
    "products": {"curvature": "BatchGradient", "representation": "Adafactor", "solver": {"CG": {"damping": 1e-3}}},
    "solver": {
        "curvature": "BatchGradient",
        "representation": "Diagonal",
        "solver": {"BlockDivision": {"power": -0.5, "damping": 1e-3}},
    },
}
"""Each with one part of a user, and the rest of the library."""
FILE_OF = {**{name: name for name in ADDED}, "products": "representation"}
DECAY = 0.9

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch has no batching rule for F.bilinear


@pytest.fixture(autouse=True)
def forgotten(registrations: None) -> Iterator[None]:
    """What the files register is undone, and none of them stays imported."""
    yield
    for name in ADDED:
        sys.modules.pop(name, None)


def load(name: str) -> ModuleType:
    return script(FOLDER / f"{FILE_OF[name]}.py")


# --- the files ------------------------------------------------------------------------------------------------------------
def test_one_file_of_forty_lines_each() -> None:
    assert {path.stem for path in FOLDER.iterdir() if path.name != "__pycache__"} == {*ADDED}
    lengths = {name: len((FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()) for name in ADDED}
    assert max(lengths.values()) <= 40, lengths


@pytest.fixture(scope="module")
def library() -> dict[str, Source]:
    return read()


@pytest.mark.parametrize("name", ADDED)
def test_a_file_uses_public_names_of_the_library_alone(name: str, library: dict[str, Source]) -> None:
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    for node in imports:
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("gradmaker") for alias in node.names)
        elif (node.module or "").startswith("gradmaker"):
            assert {alias.name for alias in node.names} <= {*import_module(str(node.module)).__all__}, node.module
    placed = f"gradmaker/{name}.py"  # as if it stood in the library
    assert [use for use in uses(library | parse({placed: text})) if use.path == placed] == []


@pytest.mark.parametrize("name", ADDED)
def test_a_file_says_its_source(name: str) -> None:
    tree = ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
    docstrings = [ast.get_docstring(node) or "" for node in tree.body if isinstance(node, ast.ClassDef)]
    assert any("Reference: " in text and "``" in text for text in docstrings)


@pytest.mark.parametrize("name", ADDED)
def test_a_file_registers_one_name_and_changes_nothing_else(name: str) -> None:
    registry, added = ADDED[name]
    before = {r.kind: [*r] for r in Registry.known}
    load(name)
    after = {r.kind: [*r] for r in Registry.known}
    assert after == before | {registry.kind: [*before[registry.kind], added]}


def test_the_page_shows_the_files() -> None:
    shown = [block.text for block in blocks(ROOT / "docs" / "adding.md") if block.label == "python"]
    for name in ADDED:
        assert (FOLDER / f"{name}.py").read_text(encoding="utf-8") in shown, f"docs/adding.md does not show {name}.py as it is"


# --- against oracles ------------------------------------------------------------------------------------------------------
class Pair(nn.Module):
    """A bilinear layer of two halves of its input, called by position, then by name."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Bilinear(3, 2, 4)
        self.out = nn.Bilinear(4, 4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.pair(x[..., :3], x[..., 3:]))
        z: Tensor = self.out(input2=h.sin(), input1=h)
        return z


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 3))


def step(maker: Any, case: Case, factor: float = 1.0) -> None:
    case.model.zero_grad()
    y = maker.setup_model_call(case.model, case.x * factor)
    maker.setup_loss_call(case.loss, y, case.t)
    maker.forward_and_backward()


def gradients(case: Case, factor: float) -> list[Tensor]:
    """By plain autograd: each layer's matrix, the bias its last column."""
    params = list(case.model.parameters())
    found = torch.autograd.grad(case.loss(case.model(case.x * factor), case.t), params)
    return [torch.cat([w.reshape(len(b), -1), b.unsqueeze(1)], 1) for w, b in zip(found[::2], found[1::2], strict=True)]


def preconditioned(model: nn.Module) -> list[Tensor]:
    found = [p.grad for p in model.parameters() if p.grad is not None]
    return [torch.cat([w.reshape(len(b), -1), b.unsqueeze(1)], 1) for w, b in zip(found[::2], found[1::2], strict=True)]


def by_tensor(G: Tensor, length: float) -> Tensor:
    """Each tensor clipped: the weight, and the bias in the last column."""
    return torch.cat([part * min(1.0, length / float(part.norm())) for part in (G[:, :-1], G[:, -1:])], 1)


def diagonal(name: str, history: list[Tensor]) -> Tensor:
    """Of ``C``, by the whole history of a layer's gradients."""
    weights = torch.tensor([DECAY**age for age in reversed(range(len(history)))], dtype=torch.float64)
    clipped = [by_tensor(G, 0.1) for G in history] if name == "curvature" else history
    V = torch.einsum("t,toi->oi", weights / weights.sum(), torch.stack(clipped) ** 2)
    if FILE_OF[name] == "representation" and V.shape != (7, 2):  # each channel of the norm layer is a block, of one row
        return torch.outer(V.sum(1), V.sum(0)) / V.sum()
    if name == "solver":
        return torch.cat([part.mean().expand(part.shape) for part in (V[:, :-1], V[:, -1:])], 1)
    return V


@pytest.mark.parametrize("name", TRIPLES)
def test_three_steps_by_definition(name: str) -> None:
    load(name)
    case = build(net, 6, 5)
    maker: Any = from_config(case.model, {"method": "custom", "decay": DECAY, **TRIPLES[name]})
    factors = (1.0, 3.0, 0.2)
    for factor in factors:
        step(maker, case, factor)
    check = maker.verify()
    assert check.passed and check.complete, check
    found = preconditioned(case.model)
    layers = [list(layer) for layer in zip(*(gradients(case, factor) for factor in factors), strict=True)]
    for got, history in zip(found, layers, strict=True):
        d = diagonal(name, history)
        expected = history[-1] / (d + 1e-3 if name == "products" else d.sqrt() + 1e-3)
        assert oracles.relative_error(got, expected) < (1e-8 if name == "products" else EXACT)


def test_the_layer_rule_gives_the_gauss_newton_matrix() -> None:
    case = build(Pair, 6, 5)
    assert {s.kind for b in measure(case, FisherExact(), Dense(granularity="layer")).plan.blocks for s in b.sites} == {
        "generic"
    }
    load("layer_rule")
    oracle = ggn(build(Pair, 6, 5))
    for granularity in ("full", "layer", "unit"):
        maker = measure(build(Pair, 6, 5), FisherExact(), Dense(granularity=granularity))  # type: ignore[arg-type]
        assert {s.kind for b in maker.plan.blocks for s in b.sites} == {"matrix"}
        compare(maker, oracle)
    check = maker.verify()
    assert check.passed and check.complete, check


def test_the_layer_rule_with_positions() -> None:
    """``A`` is the mean over positions of ``a a^T``, with a one for the bias."""
    load("layer_rule")
    case = build(lambda: nn.Sequential(Pair(), nn.Flatten(), nn.Linear(12, 3)), 6, 4, 5)
    maker = measure(case, FisherExact(), Kron())
    block = next(b for b in maker.plan.blocks if b.sites[0].name == "0.pair")
    a = torch.einsum("nri,nrj->nrij", case.x[..., :3], case.x[..., 3:]).reshape(24, 6)
    a = torch.cat([a, torch.ones(24, 1, dtype=a.dtype)], 1)
    A = next(f for f in Kron().factors(block.state) if f.shape[-1] == 7)
    assert oracles.relative_error(A[0], a.mT @ a / 24) < EXACT
    assert maker.verify().passed


def test_the_method_by_definition() -> None:
    load("method")
    options = {"fisher": "FisherExact", "damping": 0.1, "decay": 0.0, "largest": 30}
    case = build(lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), 6, 5)
    oracle = ggn(case)
    columns = oracles.exact_columns("categorical", case.t)
    ((A, B),) = oracles.kfac_factors(case.model, case.x, "0", columns, 6)
    plain = gradients(case, 1.0)
    maker: Any = from_config(case.model, {"method": "exact_small", **options})
    step(maker, case)
    assert [type(b.triple.representation) for b in maker.plan.blocks] == [Kron, Dense]
    order = oracles.joint_order(3, 7) + 42
    expected = [
        oracles.kfac_direction(plain[0], A, B, damping=0.1),
        oracles.tikhonov_solve(oracle[order][:, order], 0.1, plain[1]),
    ]
    for got, right in zip(preconditioned(case.model), expected, strict=True):
        assert oracles.relative_error(got, right) < EXACT
    check = maker.verify()
    assert check.passed and check.complete, check


# --- legal wherever the library's are -------------------------------------------------------------------------------------
OPTIONS: dict[str, dict[str, Any]] = {
    "layer_rule": {"method": "layer_ng"},
    "method": {"method": "exact_small", "largest": 30},
    **{name: {"method": "custom", **triple} for name, triple in TRIPLES.items()},
}
WRONG = {
    "curvature": {"method": "custom", "curvature": "ClipedGradient"},
    "representation": {"method": "custom", "representation": "Adafactr"},
    "solver": {"method": "custom", "solver": "BlockDivison"},
    "method": {"method": "exact_smal"},
}


def as_yaml(options: dict[str, Any]) -> str:
    yaml = pytest.importorskip("yaml")
    text: str = yaml.safe_dump(options)
    return text


@pytest.mark.parametrize("name", OPTIONS)
def test_a_mapping_and_a_yaml_file_make_it(name: str, tmp_path: Path) -> None:
    load(name)
    make = Pair if name == "layer_rule" else net
    (tmp_path / "method.yaml").write_text(as_yaml(OPTIONS[name]), encoding="utf-8")
    found = []
    for given in (OPTIONS[name], tmp_path / "method.yaml"):
        case = build(make, 6, 5)
        step(from_config(case.model, given), case)
        found.append(oracles.gradient_vector(case.model))
    assert torch.equal(*found) and bool(found[0].isfinite().all())


@pytest.mark.parametrize("name", WRONG)
def test_errors_list_it(name: str) -> None:
    added = ADDED[name][1]
    with pytest.raises(ValueError) as before:
        from_config(net(), WRONG[name])
    load(name)
    with pytest.raises(ValueError, match=f"did you mean '{added}'") as after:
        from_config(net(), WRONG[name])
    assert added not in str(before.value)
    assert f", {added}" in str(after.value)


def test_parts_are_in_the_table_of_legal_triples() -> None:
    added = [load(name) and ADDED[name][1] for name in ("curvature", "representation", "solver")]
    fit = [[str(part).partition("(")[0] for part in row[:3]] for row in legality() if row[3] is None]
    assert added in fit
    assert all(sum(name in row for row in fit) > 2 for name in added)


def test_rows_of_the_comparison() -> None:
    pytest.importorskip("yaml")
    from gradmaker.compare.parsing import parse_rows

    for name, options in OPTIONS.items():
        load(name)
        (row,) = parse_rows([options], None, None)
        maker: Any = row.build_maker(Pair() if name == "layer_rule" else net())
        assert maker.plan.blocks and row.maker == options


def test_in_a_fresh_process(tmp_path: Path) -> None:
    """As a user has it: the files on the path, imported by the command line or by a script."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(FOLDER)]), "PYTHONDONTWRITEBYTECODE": "1"}
    code = "import sys; from gradmaker.cli import main; sys.argv[1:] = {}; main()"
    listed = ["methods", *(word for name in ADDED for word in ("--import", name)), "--names"]
    process = subprocess.run(
        [sys.executable, "-c", code.format(listed)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert "exact_small" in process.stdout.splitlines()
    assert [*tmp_path.iterdir()] == []


def test_a_comparison_trains_it(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    from gradmaker.compare import Task, compare as run

    load("method")
    x = torch.randn(40, 5)
    t = (x[:, 0] > 0).long()
    found = run(
        Task(model=nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)), train=(x[:30], t[:30]), test=(x[30:], t[30:])),
        ["exact_small"],
        out=tmp_path,
        seeds=1,
        budget=1,
        batch_size=10,
        learning_rates=[0.1],
        progress=False,
    )
    assert "exact_small" in (tmp_path / "report.html").read_text(encoding="utf-8") and found is not None
