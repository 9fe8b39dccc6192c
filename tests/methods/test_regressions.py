"""Defects of ASDL, each with the tests that would catch it here.

Most are caught by tests of what is right; the rest of this file closes the gaps. A defect that cannot be here says why.
"""

from __future__ import annotations

import copy
import io
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import METHODS, from_config
from gradmaker.curvature import FisherEmp, FisherExact, FisherMC
from gradmaker.linalg.state import State
from gradmaker.representations import Dense, Diagonal
from gradmaker.representations.base import Frame
from gradmaker.solvers import CG
from tests import models, oracles
from tests.methods.test_methods import PRECONDITIONED, passes
from tests.models import Case

TESTS = Path(__file__).resolve().parents[1]
HERE = "test_regressions"

COVERED: dict[int, str] = {
    1: "test_likelihood::test_trace_does_not_depend_on_the_number_of_samples",
    2: f"{HERE}::test_variance_divides",
    3: "test_fisher::test_sequence_layouts_as_torch_takes_them",
    4: f"{HERE}::test_squared_error_of_positions",
    5: f"test_fisher::test_ignored_tokens_are_as_if_removed {HERE}::test_a_class_may_have_the_number_that_is_ignored",
    6: "test_fisher::test_class_weight_two_is_the_class_twice "
    "test_maker::test_steps_off_the_schedule_have_the_scale_of_those_on_it",
    7: "test_maker::test_what_was_in_grad_stays_and_the_step_is_added_in_its_storage",
    8: "test_maker::test_the_loss_may_come_from_inside_the_model",
    9: "test_maker::test_any_spelling_of_a_loss_is_the_loss test_maker::test_declared_calls_may_run_again",
    10: "test_maker::test_the_latest_loss_wins",
    11: "test_maker::test_draws_follow_the_seed_and_the_step_and_leave_the_global_state_alone "
    "test_maker::test_seed_zero_is_a_seed",
    12: "test_fisher::test_scale_of_the_loss test_invariances::test_loss_scale",
    13: "test_maker::test_constant_evidence_is_the_average_at_every_step",
    14: "test_methods::test_covered_gradients_differ_and_others_are_raw test_eigenbasis::test_whole_run",
    15: "test_methods::test_direction_descends test_methods::test_config_round_trip",
    16: "test_secants::test_secant_equation_without_damping test_secants::test_hessian_action_goes_to_the_inverse",
    17: f"{HERE}::test_extra_passes_leave_the_gradient_and_batches_may_shrink test_secants::test_pairs_come_from_one_batch",
    18: f"{HERE}::test_extra_passes_leave_the_gradient_and_batches_may_shrink "
    "test_secants::test_inputs_of_a_convolution_are_summed_over_locations",
    19: "test_kronecker_dims::test_block_grid_equals_independent_tensors "
    "test_kronecker_dims::test_a_solve_leaves_the_statistic "
    "test_kronecker_dims::test_a_one_by_one_factor_is_a_scalar_root test_methods::test_unused_layer "
    "test_config::test_what_is_ignored_keeps_its_plain_gradient",
    20: "test_methods::test_frozen_layer test_capture::test_a_step_holds_no_graph "
    "test_config::test_what_a_method_does_not_cover_goes_to_the_fallback",
    21: "test_low_rank::test_seng_is_the_dense_solve_of_layers test_low_rank::test_parameters_without_a_layer_get_the_fallback "
    "test_methods::test_covered_gradients_differ_and_others_are_raw",
    22: "test_low_rank::test_smw_is_the_dense_solve test_low_rank::test_batches_of_another_size_go_through_cg",
    25: "test_evidence::test_products test_fang::test_positions_are_summed_before_squares",
    26: "test_layers::test_zoo test_layers::test_groups_are_separate_convolutions_in_one_block",
    27: f"test_layers::test_zoo test_capture::test_in_place_residual {HERE}::test_norms_that_start_at_zero",
    28: "test_fisher::test_empirical_fisher_of_examples test_low_rank::test_rows_of_every_layer",
    29: "test_capture::test_module_called_twice_is_two_tied_copies",
    30: "test_layers::test_large_vocabulary test_layers::test_embedding_factor_counts_tokens",
    31: "test_triples::test_natural_gradients_are_dense_solves",
    32: "test_coverage::test_encoder_layer_steps_as_linear_layers",
    33: f"test_layers::test_zoo {HERE}::test_a_part_of_a_layer_may_be_frozen",
    34: "test_methods::test_unused_layer",
    35: "test_bad_input::test_small_models_and_batches_work test_config::test_a_rule_that_matches_nothing_is_refused",
    36: "test_schedule::test_updates_happen_when_they_are_due test_schedule::test_wrong_schedules_are_refused",
    37: "test_methods::test_state_round_trip_is_bitwise test_state::test_a_state_is_a_snapshot_in_both_directions",
    38: f"test_maker::test_two_makers_on_one_model_do_not_see_each_other {HERE}::test_nothing_is_kept_on_the_model",
    40: "test_capture::test_an_exception_leaves_everything_as_it_was",
    41: "test_methods::test_low_precision_models test_capture::test_twins "
    "test_adapters::test_layers_called_twice_in_checkpoints",
    42: "test_solvers::test_a_statistic_survives_a_hundred_prepares "
    "test_fallbacks::test_a_cholesky_that_always_fails_ends_at_eigh",
    43: "test_kronecker_methods::test_skfac_micro_batches_append",
    44: "test_roots::test_largest_eigenvalue",
    45: f"{HERE}::test_conjugate_gradients_of_nothing_and_of_negative_curvature",
    46: f"{HERE}::test_bare_parameters_have_their_place",
    47: "test_methods::test_frozen_layer test_triples::test_full_natural_gradient_of_odd_models",
    48: "test_deferred::test_operators_record_on_both_sides test_deferred::test_copies_are_safe",
    49: "test_replicas::test_two_ranks",
}

ABSENT: dict[int, str] = {
    23: "a call of a method that does not exist: mypy --strict sees every call",
    24: "modules that import or call what was removed: mypy --strict sees every call, and no file is outside of the tests",
    39: "torch.cuda on machines without CUDA: every test runs on a CPU",
}


# --- the table ------------------------------------------------------------------------------------------------------------
def test_every_defect_has_a_line() -> None:
    assert sorted([*COVERED, *ABSENT]) == list(range(1, 50))


@pytest.mark.parametrize("number", COVERED)
def test_the_tests_exist(number: int) -> None:
    for name in COVERED[number].split():
        file, _, test = name.partition("::")
        assert re.search(rf"^def {test}\(", next(TESTS.rglob(f"{file}.py")).read_text(encoding="utf-8"), re.MULTILINE), name


def test_absent_parts_are_absent() -> None:
    code = [p.read_text(encoding="utf-8") for d in ("gradmaker", "curvature", "representations", "solvers") for p in folder(d)]
    assert not any(re.search(r"nvtx", text) for text in code)


def folder(name: str) -> list[Path]:
    return sorted((TESTS.parent / name).rglob("*.py"))


# --- what no other test catches -------------------------------------------------------------------------------------------
def fisher_of(case: Case, curvature: Any, **options: Any) -> Tensor:
    """The matrix that is held for all parameters after one step."""
    representation = {"Dense": {"granularity": "full"}}
    parts = {"curvature": curvature, "representation": representation, "solver": "Cholesky"}
    maker: Any = from_config(case.model, {"method": "custom", **parts, **options})
    passes(maker, case)
    (block,) = maker.plan.blocks
    where = oracles.parameter_slices(case.model)
    index = {p: torch.arange(where[k].start, where[k].stop).reshape(p.shape) for k, p in case.model.named_parameters()}
    order = torch.cat([site.lay_out(index).reshape(-1) for site in block.sites])  # biases are the last columns there
    C: Tensor = block.triple.representation.to_dense(block.state)[0]
    return oracles.reorder(C, order.argsort())


@pytest.mark.parametrize("curvature", [FisherExact(), FisherMC(samples=2)], ids=["exact", "mc"])
def test_variance_divides(curvature: Any) -> None:
    """2: ``|z - y|^2 / 2v`` has the curvature ``J^T J / v``."""
    case = models.mlp_gaussian()
    found = [
        fisher_of(case._replace(loss=lambda z, y, v=v: F.mse_loss(z, y, reduction="sum") / (2 * v)), curvature)
        for v in (1.0, 4.0)
    ]
    assert oracles.relative_error(found[1], found[0] / 4) < 1e-10
    if isinstance(curvature, FisherExact):
        J = oracles.jacobian(case.model, case.x).flatten(0, -2)
        assert oracles.relative_error(found[0], J.mT @ J) < 1e-10


def test_squared_error_of_positions() -> None:
    """4: the last axis is that of the coordinates, whatever is before it."""
    case = models.build(lambda: nn.Linear(4, 3), 5, 2, 4, loss=F.mse_loss)
    case = case._replace(t=torch.randn(5, 2, 3, dtype=torch.float64))
    expected = oracles.loss_ggn(case.model, case.x, lambda z: case.loss(z, case.t))
    assert oracles.relative_error(fisher_of(case, FisherExact()), expected) < 1e-10


def test_a_class_may_have_the_number_that_is_ignored() -> None:
    """5: a drawn label is never compared with ``ignore_index``."""
    case = models.mlp()
    t = case.t.clamp(max=1)
    plain, other = (case._replace(t=t, loss=partial(F.cross_entropy, ignore_index=k)) for k in (-100, 2))
    for curvature in (FisherExact(), FisherMC(samples=3)):
        assert oracles.relative_error(fisher_of(other, curvature), fisher_of(plain, curvature)) < 1e-12


@pytest.mark.parametrize("method", PRECONDITIONED)
def test_extra_passes_leave_the_gradient_and_batches_may_shrink(method: str) -> None:
    """17, 18: what lies in ``.grad`` is neither read nor added to, and the last batch may be smaller."""
    steps = []
    for dirty in (False, True):
        case = models.mlp()
        maker = from_config(case.model, {"method": method})
        for rows in (len(case.x), len(case.x), 2):
            for p in case.model.parameters():
                p.grad = torch.full_like(p, 100.0) if dirty else None
            maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x[:rows]), case.t[:rows])
            maker.forward_and_backward()
        steps.append(oracles.gradient_vector(case.model) - (100 if dirty else 0))
    assert steps[0].isfinite().all()
    assert oracles.relative_error(steps[1], steps[0]) < 1e-9


@pytest.mark.parametrize("method", ["kfac", "unit_ng", "fang", "diag_ng"])
@pytest.mark.parametrize("kind", ["layer_norm", "group_norm"])
def test_norms_that_start_at_zero(method: str, kind: str) -> None:
    """27: the normalised input does not come from the output."""
    for bias in (True, False):
        case = models.normed(kind, zero_scale=True, bias=bias)
        passes(from_config(case.model, {"method": method, "fisher": FisherEmp()}), case)
        assert oracles.gradient_vector(case.model).isfinite().all()


@pytest.mark.parametrize("method", PRECONDITIONED)
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_part_of_a_layer_may_be_frozen(method: str, part: str) -> None:
    """33."""
    case = models.mlp()
    first = next(m for m in case.model.modules() if isinstance(m, nn.Linear))
    getattr(first, part).requires_grad_(False)
    maker = from_config(case.model, {"method": method})
    for _ in range(2):
        passes(maker, case)
    assert getattr(first, part).grad is None
    assert all(p.grad is not None and p.grad.isfinite().all() for p in case.model.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", PRECONDITIONED)
def test_nothing_is_kept_on_the_model(method: str) -> None:
    """38: a model that is saved after a step is as large as before, and its modules have no new attributes."""
    case = models.mlp()

    def size() -> int:
        buffer = io.BytesIO()
        torch.save(case.model, buffer)
        return buffer.tell()

    before, names = size(), [sorted(vars(m)) for m in case.model.modules()]
    maker = from_config(case.model, {"method": method})
    for _ in range(2):
        passes(maker, case)
    case.model.zero_grad(set_to_none=True)
    assert [sorted(vars(m)) for m in case.model.modules()] == names
    assert abs(size() - before) < 200


class Signed(Diagonal):
    """A diagonal that need not be positive."""


def test_conjugate_gradients_of_nothing_and_of_negative_curvature() -> None:
    """45."""
    frame = Frame(2, (3,), frozenset(), torch.float64, torch.device("cpu"))
    representation, solver = Signed(), CG(damping=0.1)
    state: State = representation.init(frame)
    state["diagonal"][0], state["diagonal"][1], state["mass"][:] = 1.0, -1.0, 1.0
    cache = solver.prepare(representation, state, None)
    assert solver.solve(representation, cache, torch.zeros(2, 3, dtype=torch.float64)).abs().max() == 0
    found = solver.solve(representation, cache, torch.ones(2, 3, dtype=torch.float64))
    assert found.isfinite().all() and oracles.relative_error(found[0], torch.full((3,), 1 / 1.1, dtype=torch.float64)) < 1e-12


@pytest.mark.parametrize("curvature", ["FisherExact", "Hessian"])
def test_bare_parameters_have_their_place(curvature: str) -> None:
    """46: parameters of no layer shift nothing, and ``.grad`` holds no graph."""
    case = models.bare_scale()
    twin = copy.deepcopy(case)
    found = fisher_of(case, curvature if curvature == "FisherExact" else {curvature: {}}, **solver_for(curvature))
    oracle = oracles.loss_ggn if curvature == "FisherExact" else oracles.hessian
    expected = oracle(twin.model, twin.x, lambda z: twin.loss(z, twin.t))
    assert oracles.relative_error(found, expected) < 1e-9
    assert all(p.grad is not None and not p.grad.requires_grad for p in case.model.parameters())


def solver_for(curvature: str) -> dict[str, str]:
    """LU takes what is not definite."""
    return {} if curvature == "FisherExact" else {"solver": "LU"}


def test_dense_blocks_are_the_sums_they_say() -> None:
    """6: the loss' own denominator, for class weights too."""
    case = models.mlp()
    loss = partial(F.cross_entropy, weight=torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64))
    case = case._replace(loss=loss)
    expected = oracles.loss_ggn(case.model, case.x, lambda z: loss(z, case.t))
    assert oracles.relative_error(fisher_of(case, FisherExact()), expected) < 1e-10
    assert Dense(granularity="full").grain == "full" and len(METHODS) > 1
