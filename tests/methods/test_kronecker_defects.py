"""Defects of published Shampoo, CASPR, KrADagrad and SOAP code, each with the tests that would catch it here.

What no other test catches is at the end.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gradmaker import METHODS, from_config
from tests import oracles
from tests.methods.test_kronecker_dims import Matrices, gradients

TESTS = Path(__file__).resolve().parents[1]
HERE = "test_kronecker_defects"

COVERED: dict[str, str] = {
    "ridge added in place to the statistic": "test_matrix_roots::test_statistic_is_left_as_it_was "
    "test_kronecker_dims::test_a_solve_leaves_the_statistic test_solvers::test_a_statistic_survives_a_hundred_prepares",
    "1 x 1 factor becomes the identity": "test_kronecker_dims::test_a_one_by_one_factor_is_a_scalar_root "
    "test_roots::test_a_scalar_factor_is_a_scalar_root test_matrix_roots::test_edges",
    "power iteration with an absolute tolerance": "test_matrix_roots::test_scale_law_in_float32 "
    "test_roots::test_largest_eigenvalue test_kronecker_dims::test_direction_does_not_depend_on_the_scale",
    "a graft that was not asked for": "test_kronecker_dims::test_grafting_takes_the_length_and_none_leaves_it "
    f"{HERE}::test_without_a_graft_the_length_is_the_methods_own",
    "Nesterov's buffer decays twice, a longer step before the start": "test_trajectories_axes::test_thirty_steps "
    f"{HERE}::test_before_the_start_the_gradient_is_plain",
    "the release is reproduced where that is asked for": "test_krad::test_kradagrad_star test_krad::test_kradagrad_as_released "
    "test_quadratic::test_rows_take_the_authors_steps test_options::test_a_published_variant_refuses_another_option",
    "L - eps L^2 is zero at L = I / eps": "test_krad::test_damping_at_the_start_does_not_annihilate",
    "only the first block's root is renewed": "test_krad::test_every_touched_root_of_every_block_is_renewed "
    "test_trajectories_axes::test_thirty_steps",
    "the gradient is overwritten by a partly preconditioned one": f"{HERE}::test_before_the_start_the_gradient_is_plain",
    "greedy merging turns small matrices into vectors": "test_kronecker_dims::test_merging_of_known_shapes "
    f"{HERE}::test_a_small_matrix_stays_a_matrix_unless_asked",
    "division by the length of a zero step": "test_kronecker_dims::test_zero_gradients_stay_zero_and_finite "
    "test_caspr_adaptive::test_zero_gradients_stay_zero",
    "the coupled iterate is taken for the residual": "test_matrix_roots::test_diagnosis_is_the_residual_of_the_matrix "
    "test_matrix_roots::test_residual_sees_what_the_coupled_iterate_does_not",
    "KL-Shampoo with the exponent 1/4 and without 1/n": "test_krad::test_kl_shampoo "
    "test_krad::test_a_unit_side_gives_the_one_sided_statistic test_krad::test_kl_factors_recover_a_kronecker_covariance",
    "SOAP drops the first gradient": f"test_soap::test_soap {HERE}::test_the_first_step_is_a_step",
    "SOAP sorts its basis and not the moments": "test_soap::test_the_order_of_a_power_step_is_that_of_the_moments "
    "test_soap::test_signs_and_order_of_columns_do_not_matter_if_the_moments_follow",
}


@pytest.mark.parametrize("defect", COVERED)
def test_the_tests_exist(defect: str) -> None:
    for name in COVERED[defect].split():
        file, _, test = name.partition("::")
        assert re.search(rf"^def {test}\(", next(TESTS.rglob(f"{file}.py")).read_text(encoding="utf-8"), re.MULTILINE), name


# --- what no other test catches -------------------------------------------------------------------------------------------
ON_AXES = ["shampoo", "one_sided", "caspr", "full_adagrad", "kradagrad", "kradagrad_star", "kl_shampoo", "soap", "eshampoo"]


@pytest.mark.parametrize("method", ON_AXES)
def test_without_a_graft_the_length_is_the_methods_own(method: str) -> None:
    """KrADagrad's release takes the length of the gradient with its graft switched off, too."""
    model = Matrices((4, 3))
    maker: Any = from_config(model, {"method": method, "grafting": "none"})
    for g in gradients(4, 3):
        model.w[0].grad = g.clone()
        maker.precondition()
    assert abs(float(model.w[0].grad.norm() / g.norm()) - 1) > 1e-3


@pytest.mark.parametrize("method", ON_AXES)
def test_before_the_start_the_gradient_is_plain(method: str) -> None:
    """Statistics are gathered from it, and are those of a run that starts at once."""
    late, once = Matrices((4, 3)), Matrices((4, 3))
    options = {"method": method, "grafting": "none", "beta1": 0.0, **({"nesterov_average": False} if method == "caspr" else {})}
    makers: list[Any] = [from_config(late, {**options, "start_step": 5}), from_config(once, options)]
    for t, g in enumerate(gradients(4, 3, steps=8)):
        for model, maker in zip((late, once), makers, strict=True):
            model.w[0].grad = g.clone()
            maker.precondition()
        if t < 5:
            assert torch.equal(late.w[0].grad, g)
        else:
            assert torch.equal(late.w[0].grad, once.w[0].grad)


def test_a_small_matrix_stays_a_matrix_unless_asked() -> None:
    """12 x 7 is a vector of 84 by greedy merging, and `summary` shows it; no method merges so by itself."""
    assert "greedy" not in {getattr(METHODS[m].Config(), "merge", "none") for m in METHODS}
    layer = nn.Linear(7, 12, bias=False)
    shapes = {}
    for merge in ("none", "to_2d", "greedy"):
        maker: Any = from_config(layer, {"method": "shampoo", "merge": merge, "block_size": 128})
        ((_, shapes[merge], *_),) = maker.summary().rows
    assert shapes == {"none": "1 x (12, 7)", "to_2d": "1 x (12, 7)", "greedy": "1 x (84,)"}


@pytest.mark.parametrize("method", ["soap", "eshampoo"])
def test_the_first_step_is_a_step(method: str) -> None:
    """The reference of SOAP leaves the parameter alone; without ``skip_first`` the rotated moment starts isotropic."""
    model = Matrices((4, 3))
    (g,) = gradients(4, 3, steps=1)
    found = {}
    for name, extra in {"": {"skip_first": False}, "skip": {}}.items():
        if method == "eshampoo" and not extra:
            continue
        maker: Any = from_config(model, {"method": method, "beta1": 0.0, **(extra if method == "soap" else {})})
        model.w[0].grad = g.clone()
        maker.precondition()
        found[name] = model.w[0].grad.clone()
    assert oracles.relative_error(found[""], g / g.square().mean().sqrt()) < 1e-6
    assert not found.get("skip", torch.zeros(1)).any()
