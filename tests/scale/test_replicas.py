"""Replicas of a model in several processes are one process with the whole batch: methods, loops, losses, layers, faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import gradmaker as gm
from tests.scale import faults, replicas

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="gloo is not in this build")

METHODS = [name for name in gm.METHODS if name != "custom"]
REFUSED = {
    "hessian_free": "GaussNewton",
    "ksd": "GaussNewton",
    "lissa": "GaussNewton",
    "curveball": "GaussNewton",
    "newton": "Hessian",
    "saddle_free": "Hessian",
    "neumann": "Hessian",
}
"""Methods whose curvature is not that of all ranks, with the name in the refusal."""
SIGNS = {"soap", "eshampoo"}
"""Methods whose steps depend on the signs of eigenvectors, which rounding decides where eigenvalues are equal."""
INVERSES = {"kradagrad_star", "kradagrad", "psgd", "psgd_kf", "psgd_whiten", "kl_shampoo", "caspr"}
"""Methods whose statistic is an inverse, or is measured by one."""
FLOORS = {
    "shampoo": 1e-8,
    "full_adagrad": 1e-7,
    "ggt": 1e-3,
    "mfac": 1e-3,
    "caspr": 1e-7,
    "tonga": 1e-8,
    "smw_ng": 1e-8,
    "smw_gn": 1e-8,
}
"""Relative errors of ten steps of methods that amplify rounding: one unit in the last place moves them as far."""
ACCUMULATED = ["kfac", "shampoo", "ekfac", "adahessian", "lbfgs"]
ATTACHED: dict[str, dict[str, Any]] = {
    "kfac": {"method": "kfac", "likelihood": "categorical"},
    "kfac, likelihood read": {"method": "kfac", "damping": 0.1},
    "kfac, empirical": {"method": "kfac", "fisher": {"FisherEmp": {}}, "likelihood": "categorical"},
    "ekfac": {"method": "ekfac", "likelihood": "categorical"},
    "smw_ng": {"method": "smw_ng", "likelihood": "categorical"},
    "kfra": {"method": "kfra", "likelihood": "categorical"},
    "adam": {"method": "adam"},
    "front door": {"method": "kfac", "likelihood": "categorical", "front": True},
}
WRAPPERS: dict[str, dict[str, Any]] = {
    "static_graph": {"static_graph": True},
    "views": {"gradient_as_bucket_view": True},
    "unused": {"find_unused_parameters": True},
}
CUSTOM = {"curvature": {"FisherForward": {}}, "representation": {"Kron": {}}, "solver": {"Eigh": {}}}
OPTIONS: dict[str, dict[str, Any]] = {
    "intervals": {"method": "ekfac", "curvature_interval": 2, "preconditioner_interval": 3},
    "sum over steps": {"method": "kfac", "decay": None},
    "newest alone": {"method": "kfac", "decay": 0},
    "inputs alone": {
        "method": "custom",
        "curvature": {"FisherForward": {}},
        "representation": {"Kron": {}},
        "solver": {"Eigh": {}},
    },
    "clip": {"method": "kfac", "clip": 1e-3, "clip_learning_rate": 0.01},
    "groups": {"method": "kfac", "groups": {"0*": "ekfac", "2*": "shampoo", "*": "kfac"}},
    "samples": {"method": "unit_ng", "fisher": {"FisherMC": {"samples": 3}}},
    "empirical": {"method": "smw_ng"},
}
EXACT: dict[str, dict[str, Any]] = {
    "kfac": {"method": "kfac", "fisher": {"FisherExact": {}}},
    "ekfac": {"method": "ekfac", "fisher": {"FisherExact": {}}},
    "skfac": {"method": "skfac", "fisher": {"FisherExact": {}}},
    "seng": {"method": "seng"},
}
"""Without samples, which are drawn for positions."""
SAVED = ["kfac", "ekfac", "adam", "lbfgs", "kbfgs", "skfac", "smw_ng", "mfac"]
LOSSES = ["sum", "class weights", "terms, mean", "terms, sum", "gaussian", "bernoulli", "two", "own"]
LAYERS = ["convolution", "tokens", "tied", "twice", "norm", "attention"]


WORK: list[tuple[str, Any, dict[str, dict[str, Any]]]] = [
    ("micro", replicas.attached_micro_batches, {k: {"method": k} for k in ("kfac", "ekfac", "adam")}),
    ("options", replicas.of_options, OPTIONS),
    ("lengths", replicas.of_lengths, EXACT),
]


def methods_of(rank: int, world: int, folder: str) -> dict[Any, Any]:
    return {name: replicas.attempt(replicas.by_method, name, rank, world) for name in METHODS}


def all_of(rank: int, world: int, folder: str) -> dict[Any, Any]:
    attempt, found = replicas.attempt, methods_of(rank, world, folder)
    found |= {("accumulated", name): attempt(replicas.accumulated, name, rank, world) for name in ACCUMULATED}
    found |= {("attached", k): attempt(replicas.attached, options, rank, world) for k, options in ATTACHED.items()}
    for name, options in WRAPPERS.items():
        found["wrapper", name] = attempt(lambda o=options: replicas.attached(ATTACHED["kfac"], rank, world, **o))
    for kind, work, options_of in WORK:
        found |= {(kind, name): attempt(work, options, rank, world) for name, options in options_of.items()}
    found |= {("loss", name): attempt(replicas.of_loss, name, rank, world) for name in LOSSES}
    found |= {("layers", name): attempt(replicas.of_model, name, rank, world) for name in LAYERS}
    found |= {("saved", name): attempt(replicas.saved, name, rank, world, folder) for name in SAVED}
    found["fresh optimizer"], found["folder"] = attempt(replicas.of_a_fresh_optimizer, rank, world), folder
    found["forward"] = attempt(faults.told_of_a_forward_pass, rank)
    found["backward"] = attempt(faults.told_of_a_backward_pass, rank)
    found |= {("skipped", name): attempt(faults.skipped, name, rank) for name in ("kfac", "shampoo", "lbfgs")}
    found["one layer"] = attempt(faults.fired_on_one_rank, rank)
    found["refused"] = attempt(faults.refused, rank)
    found["restarted"] = attempt(faults.restarted, rank, folder)
    found["limit"], found["alone"] = attempt(faults.limit, rank), attempt(faults.alone, rank)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def killed(folder: Path) -> tuple[str, float]:
    return faults.killed(folder / "killed")


@pytest.fixture(scope="module")
def two(folder: Path, killed: tuple[str, float]) -> list[dict[Any, Any]]:
    return replicas.spawned(2, folder, all_of)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return replicas.spawned(4, tmp_path_factory.mktemp("four"), methods_of)


def same(found: list[dict[Any, Any]], key: Any) -> Any:
    """The result of all ranks, which is bitwise the same."""
    for result in found:
        assert not isinstance(result[key], str), result[key]
    each = [replicas.leaves(result[key]) for result in found]
    for other in each[1:]:
        assert len(other) == len(each[0]) and all(torch.equal(a, b) for a, b in zip(each[0], other, strict=True)), key
    return found[0][key]


def error(a: Any, b: Any) -> float:
    """The largest relative difference of tensors."""
    pairs = list(zip(replicas.leaves(a), replicas.leaves(b), strict=True))
    assert pairs
    largest = max(float(y.double().norm()) for _, y in pairs)  # a gradient that is zero in theory is rounding alone
    return max(float((x.double() - y.double()).norm()) / max(float(y.double().norm()), 1e-4 * largest) for x, y in pairs)


def check_method(found: list[dict[Any, Any]], name: str, world: int) -> None:
    if name in REFUSED:
        for result in found:
            assert f"{world} processes, and {REFUSED[name]} is measured on the passes of each rank alone" in result[name]
        return
    equal, steps = same(found, name)
    alone, alone_steps = replicas.by_method(name, None, world)
    assert error([raw for raw, _ in equal], [raw for raw, _ in alone]) < 1e-13
    if name in SIGNS:
        return
    if replicas.leaves([dense for _, dense in alone]):
        limit = 1e-11 if name in INVERSES else 1e-13
        assert error([dense for _, dense in equal], [dense for _, dense in alone]) < limit
    assert error(steps, alone_steps) < FLOORS.get(name, 1e-10)


def test_a_killed_rank_ends_the_others(killed: tuple[str, float]) -> None:
    text, seconds = killed
    assert text != "no error" and seconds < 10


@pytest.mark.parametrize("name", METHODS)
def test_two_ranks(two: list[dict[Any, Any]], name: str) -> None:
    check_method(two, name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_four_ranks(four: list[dict[Any, Any]], name: str) -> None:
    check_method(four, name, 4)


@pytest.mark.parametrize("name", ACCUMULATED)
def test_micro_batches(two: list[dict[Any, Any]], name: str) -> None:
    assert error(same(two, ("accumulated", name)), replicas.accumulated(name, None, 2)) < 1e-11


@pytest.mark.parametrize("name", ATTACHED)
def test_attached(two: list[dict[Any, Any]], name: str) -> None:
    assert error(same(two, ("attached", name)), replicas.attached(ATTACHED[name], None, 2)) < 1e-11


@pytest.mark.parametrize("name", WRAPPERS)
def test_options_of_the_wrapper(two: list[dict[Any, Any]], name: str) -> None:
    assert error(same(two, ("wrapper", name)), replicas.attached(ATTACHED["kfac"], None, 2)) < 1e-11


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, _, options in WORK for name in options])
def test_options_and_loops(two: list[dict[Any, Any]], kind: str, name: str) -> None:
    work, options = next((work, options) for each, work, options in WORK if each == kind)
    assert error(same(two, (kind, name)), work(options[name], None, 2)) < 1e-10


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LOSSES)
def test_losses(two: list[dict[Any, Any]], name: str) -> None:
    limit = 1e-6 if name == "own" else 1e-11  # by the root of a singular Hessian
    assert error(same(two, ("loss", name)), replicas.of_loss(name, None, 2)) < limit


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LAYERS)
def test_layers(two: list[dict[Any, Any]], name: str) -> None:
    assert error(same(two, ("layers", name)), replicas.of_model(name, None, 2)) < 1e-9


# --- faults ---------------------------------------------------------------------------------------------------------------
def test_an_exception_on_one_rank_is_one_on_all(two: list[dict[Any, Any]]) -> None:
    texts = [result["forward"][0] for result in two]
    assert texts[1] == "ValueError: no such file"
    assert "rank 1: ValueError: no such file" in texts[0]
    assert all(result["forward"][1] for result in two), "the step was not taken back"
    same([{"after": result["forward"][2]} for result in two], "after")
    texts = [result["backward"] for result in two]
    assert "rank 0: " in texts[1] and "broken backward" in texts[1] and "broken backward" in texts[0]


@pytest.mark.parametrize("name", ["kfac", "shampoo", "lbfgs"])
def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_on_all(two: list[dict[Any, Any]], name: str) -> None:
    for result in two:
        kept, skipped, _ = result["skipped", name]
        assert kept and skipped == 1
    assert all(t.isfinite().all() for t in replicas.leaves(same(two, ("skipped", name))))


def test_a_layer_that_fires_on_one_rank(two: list[dict[Any, Any]]) -> None:
    assert all(t.isfinite().all() for t in replicas.leaves(same(two, "one layer")))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("static_graph", "leave static_graph out"),
        ("weights", r"weights of this micro-batch differ between ranks, [0.25, 0.5]"),
        ("losses", "neither a mean nor a sum"),
        ("not reduced", "the gradients differ between ranks"),
        ("join", "join() answers the collectives of its own model alone"),
    ],
)
def test_refusals_by_name(two: list[dict[Any, Any]], what: str, words: str) -> None:
    for result in two:
        assert words in result["refused"][what]


def test_a_rank_that_does_not_come_ends_the_others_in_time(two: list[dict[Any, Any]]) -> None:
    text, seconds, _ = two[0]["alone"]
    assert "imed out" in text and seconds < 20
    same([{"after": result["alone"][2]} for result in two], "after")
    assert [result["limit"] for result in two] == [60, 60]


def test_a_restart_after_a_fault_is_the_run_without_it(two: list[dict[Any, Any]]) -> None:
    resumed, whole = same(two, "restarted")
    assert error(resumed, whole) == 0


# --- checkpoints ----------------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAVED)
def test_a_checkpoint_of_two_ranks_resumes_on_two_and_on_one(two: list[dict[Any, Any]], name: str) -> None:
    went_on, resumed = same(two, ("saved", name))
    assert error(resumed, went_on) == 0
    maker, model = replicas.loaded(name, f"{two[0]['folder']}/{name}")
    assert error(replicas.steps(maker, model, None, 2, 3, 6), went_on) < 1e-12


def test_state_dicts_of_torch_for_a_fresh_optimizer(two: list[dict[Any, Any]]) -> None:
    for result in two:
        names, step = result["fresh optimizer"]
        assert names == sorted(name for name, _ in replicas.net().named_parameters()) and step == 0
