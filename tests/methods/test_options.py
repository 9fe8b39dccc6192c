"""Every option of every method changes what it does, or is refused by a sentence; what is refused would change nothing."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradmaker import (
    METHODS,
    CasprGradientConfig,
    CustomGradientConfig,
    CustomGradientMaker,
    KbfgsGradientConfig,
    KfacGradientConfig,
    KradagradGradientConfig,
    KradagradStarGradientConfig,
    LbfgsGradientConfig,
    NeumannPracticalGradientConfig,
    NeumannPracticalGradientMaker,
)
from gradmaker.config import OF_A_FALLBACK
from gradmaker.curvature import (
    CURVATURES,
    BatchGradient,
    FisherEmp,
    Secant,
)
from gradmaker.representations import REPRESENTATIONS, AlternatingInverse, Pairs, Rows
from gradmaker.representations.base import NEWEST_ALONE
from gradmaker.representations.roles import PerStep, diagonal_axes
from gradmaker.solvers import CG, Apply, PositiveRoot
from tests import oracles
from tests.docs.test_sweep import COVER
from tests.option_trials import (
    COMMON,
    ELSEWHERE,
    EVERY,
    NAMED,
    OTHER_PARTS,
    TRIALS,
    Trial,
    chain,
    few,
    mixed,
    observe,
    values,
)
from tests.registry import legal_options, suited, without_draws
from tests.test_triples import mapping

ROOT = Path(__file__).resolve().parents[2]


CHECKS = {"self_check", "batch_axis"}


def name_of(trial: Trial) -> str:
    return f"{trial.method}-{trial.option}-{str(trial.value)[:16]}"


@pytest.mark.parametrize("trial", few(TRIALS), ids=name_of)
def test_every_option_has_an_effect_somewhere_or_is_refused(trial: Trial) -> None:
    trial.run()


@pytest.mark.slow
@pytest.mark.parametrize("trial", TRIALS, ids=name_of)
def test_every_option_of_every_method_has_an_effect_or_is_refused(trial: Trial) -> None:
    trial.run()


@pytest.mark.slow
@pytest.mark.parametrize("option", COMMON)
@pytest.mark.parametrize("row", COVER, ids="-".join)
def test_every_option_of_a_free_triple_has_an_effect_or_is_refused(row: tuple[str, str, str], option: str) -> None:
    config: Any = CustomGradientConfig(**{key: part for key, part in mapping(*row).items() if key != "method"})
    held = config.representation
    parts = {"curvature": config.curvature, "representation": held, "solver": config.solver}
    for value in COMMON[option]:
        natural = option == "decay" and value == 0.0 and NEWEST_ALONE.items() <= held.inapplicable.items()
        if value != getattr(config, option) and not natural:
            Trial("custom", parts, option, value).run()


def test_another_value_is_known_of_every_option() -> None:
    """One that is not in `COMMON`, nor clear from its type, needs a line in `OWN` of tests/option_trials.py."""
    options = [(method, f.name) for method in NAMED for f in fields(METHODS[method].Config)]
    assert [option for option in options if not values(*option) and option not in ELSEWHERE] == []
    assert {(trial.method, trial.option) for trial in TRIALS} | set(ELSEWHERE) == set(options)
    assert {trial.option for trial in few(TRIALS)} | {name for _, name in ELSEWHERE} == {name for _, name in options}
    assert NAMED == [method for method in METHODS if fields(METHODS[method].Config)]


def test_what_no_trial_shows_has_a_reason_and_a_test() -> None:
    """Short tables of options that a method has and accepts, each naming a file of tests that knows the option."""
    for (method, name), reason in {**ELSEWHERE, **OTHER_PARTS}.items():
        config: Any = METHODS[method].Config()
        assert name in vars(config) and name not in config.inapplicable_options(), f"{method}.{name}: stale"
        assert name in (ROOT / reason.rpartition(": ")[2]).read_text(encoding="utf-8"), reason
    assert {name for _, name in (*ELSEWHERE, *OTHER_PARTS)} == {
        "rate",
        "mode",
        "failures_allowed",
        "groups",
        "embeddings",
        "root",
        *CHECKS,
    }


@pytest.mark.parametrize(
    ("method", "option", "value"), [("muon", "max_dim", 3), ("smw_ng", "stagger", False), ("smw_gn", "stagger", False)]
)
def test_options_that_have_only_other_bytes_or_another_method_to_speak_to(method: str, option: str, value: Any) -> None:
    """Refused, except where a fallback shares them; intervals it has of its own."""
    make: Any = METHODS[method].Config
    with pytest.raises(ValueError, match=rf"{option}={value} would have no effect"):
        make(**{option: value})
    if option not in OF_A_FALLBACK and "fallback" not in make().inapplicable_options():
        assert getattr(make(fallback="kfac", **{option: value}), option) == value


def test_muon_holds_gradients_and_no_matrix_of_their_rows() -> None:
    model = torch.nn.Linear(900, 700)
    maker: Any = METHODS["muon"](model)
    assert maker.summary().bytes < 2.1 * 4 * sum(p.numel() for p in model.parameters())  # and their average


# --- declarations ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", NAMED)
def test_an_inapplicable_option_is_refused_and_its_default_is_not(method: str) -> None:
    make: Any = METHODS[method].Config
    inapplicable = make().inapplicable_options()
    for name, reason in inapplicable.items():
        assert make(**{name: getattr(make(), name)}) == make()
        for value in values(method, name):
            with pytest.raises(ValueError) as caught:
                make(**{name: value})
            assert str(caught.value) == f"{name}={value!r} would have no effect: {reason}"


@pytest.mark.parametrize("name", REPRESENTATIONS)
def test_representations_say_what_they_ignore(name: str) -> None:
    held = REPRESENTATIONS[name]()
    try:
        limited = bool(diagonal_axes(held, (9,) if held.grain in ("full", "unit") else (9, 9), 3))
    except ValueError:
        limited = True
    assert ("max_dim" in held.inapplicable) != limited
    assert ("curvature_interval" in held.inapplicable) == ("warmup_steps" in held.inapplicable) == isinstance(held, PerStep)
    assert set(held.inapplicable) <= set(COMMON)


@pytest.mark.parametrize("name", CURVATURES)
def test_curvatures_say_what_they_ignore(name: str) -> None:
    curvature = CURVATURES[name]()
    assert set(curvature.inapplicable) <= {"seed", "likelihood", "loss_reduction", *CHECKS}
    said = CHECKS - {"self_check"} if "outputs" in curvature.needs else CHECKS  # of which it decides about losses
    assert set(curvature.inapplicable) & CHECKS == (set() if "calls" in curvature.needs else said)


def test_options_of_a_free_triple_are_those_of_its_parts() -> None:
    rows: dict[str, Any] = {"curvature": FisherEmp(), "representation": Rows(), "solver": CG()}
    assert CustomGradientConfig(**rows, decay=0.0).decay == 0.0  # which is what it does
    for option, value in {"decay": 0.5, "max_dim": 5, "seed": 1, "stagger": False, "fallback": "adam"}.items():
        with pytest.raises(ValueError, match=f"{option}=.* would have no effect"):
            CustomGradientConfig(**rows, **{option: value})
    pairs: dict[str, Any] = {"curvature": Secant(), "representation": Pairs(), "solver": Apply()}
    for option, value in {"decay": 0.0, "damping": 0.1}.items():
        with pytest.raises(ValueError, match=f"{option}={value} would have no effect: .*set"):
            CustomGradientConfig(**pairs, **{option: value})


def test_what_a_fallback_shares_is_not_refused() -> None:
    with pytest.raises(ValueError, match="seed=1 would have no effect"):
        KbfgsGradientConfig(seed=1)
    shared = [KbfgsGradientConfig(fallback="kfac", seed=seed) for seed in (0, 1)]
    seen = [observe("kbfgs", config, F.cross_entropy, torch.float64) for config in shared]
    assert not seen[0].same(seen[1], 1e-9)
    with pytest.raises(ValueError, match=r"decay=0\.5 would have no effect"):
        LbfgsGradientConfig(decay=0.5)


def test_a_nesterov_average_needs_an_average() -> None:
    with pytest.raises(
        ValueError, match="nesterov_average=True would have no effect: there is no average of gradients; set beta1"
    ):
        KfacGradientConfig(nesterov_average=True)
    assert KfacGradientConfig(nesterov_average=True, beta1=0.5).nesterov_average
    assert CasprGradientConfig(beta1=0.0).nesterov_average  # its default, which then says nothing
    assert not CasprGradientConfig(beta1=0.0, nesterov_average=False).nesterov_average


# --- single options -------------------------------------------------------------------------------------------------------
OWN_MEMORY = (
    *("ekfac", "soap", "eshampoo", "caspr_adaptive", "kl_shampoo"),  # a basis, or whitened axes, of the step before
    *("kbfgs", "kbfgs_l"),  # secants
    *("adahessian", "esgd", "saddle_free_diagonal"),  # probes that depend on the step
    "kradagrad",  # refuses it
)
FORGETTING = [name for name in NAMED if "decay" not in METHODS[name].Config().inapplicable_options() and name not in OWN_MEMORY]


def directions(method: str, config: Any, first: int) -> Tensor:
    """The result of the third batch, of a maker that has begun with the ``first`` one."""
    case = suited(method, mixed, chain)
    maker: Any = METHODS[method](case.model, config)
    for k in range(first, 3):
        case.model.zero_grad()
        maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x[k:]), case.t[k:])
        maker.forward_and_backward()
    return oracles.gradient_vector(case.model)


@pytest.mark.parametrize("method", FORGETTING)
def test_a_decay_of_zero_keeps_the_newest_batch_alone(method: str) -> None:
    options = legal_options(method, **EVERY, beta1=0.0, grafting="none") | without_draws(method)
    config: Any = METHODS[method].Config(**options, decay=0.0)
    found = directions(method, config, 2)
    assert oracles.relative_error(directions(method, config, 0), found) < 1e-11
    if method != "skfac":  # which has no past
        with_past = METHODS[method].Config(**options, decay=None)
        assert oracles.relative_error(directions(method, with_past, 0), found) > 1e-3


def test_an_inverse_that_cannot_forget_says_so() -> None:
    with pytest.raises(ValueError, match="decay=0: expected a decay above 0"):
        KradagradGradientConfig(decay=0.0)
    case = mixed()
    parts: dict[str, Any] = {"curvature": BatchGradient(), "representation": AlternatingInverse(), "solver": PositiveRoot()}
    maker = CustomGradientMaker(case.model, CustomGradientConfig(**parts, decay=0.0))
    maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x), case.t)
    with pytest.raises(ValueError, match="decay=0: expected a decay above 0"):
        maker.forward_and_backward()


@pytest.mark.parametrize(
    ("make", "option", "value"),
    [
        (KradagradStarGradientConfig, "denominator", "tr"),
        (KradagradStarGradientConfig, "grafting", "adam"),
        (KradagradGradientConfig, "start", 0.5),
        (KradagradGradientConfig, "grafting", "adam"),
    ],
)
def test_a_published_variant_refuses_another_option(make: Any, option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{option}={value!r}: compat='kradagrad' sets"):
        make(compat="kradagrad", **{option: value})


def test_the_rate_of_the_neumann_optimizer_says_how_far_weights_are_displaced() -> None:
    far = []
    for rate in (0.1, 0.2):
        case = mixed()
        maker = NeumannPracticalGradientMaker(case.model, NeumannPracticalGradientConfig(rate=rate))
        for _ in range(3):
            case.model.zero_grad()
            maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x), case.t)
            maker.forward_and_backward()
        displaced = oracles.parameter_vector(case.model).clone()
        with maker.undisplaced():
            far.append(displaced - oracles.parameter_vector(case.model))
    assert oracles.relative_error(far[1], 2 * far[0]) < 1e-12 and far[0].norm() > 0.01
