"""What a maker saves: a snapshot that goes on bitwise at any step, wherever it is loaded, or is refused by name."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradmaker as gm
from gradmaker import gathering
from gradmaker.curvature import FisherEmp, FisherExact, FisherMC
from gradmaker.schedule import Linear, Stepped
from tests.models import Case, bare_scale, linear, mlp, unused
from tests.registry import suited

SPARSE: dict[str, Any] = {"curvature_interval": 3, "preconditioner_interval": 4, "warmup_steps": 2}
CONFIGS: dict[str, Callable[[], Any]] = {
    "plain": gm.PlainGradientConfig,
    "adam": gm.AdamGradientConfig,
    "adagrad_kept": lambda: gm.AdagradGradientConfig(grafting="keep"),
    "shampoo_adagrad": lambda: gm.ShampooGradientConfig(grafting="adagrad", beta1=0.9, **SPARSE),
    "shampoo_adam": lambda: gm.ShampooGradientConfig(grafting="adam", root="newton", decay=None, **SPARSE),
    "kfac_mc": lambda: gm.KfacGradientConfig(fisher=FisherMC(samples=2), beta1=0.5, **SPARSE),
    "kfac_at_once": lambda: gm.KfacGradientConfig(stagger=False, split="exact", **SPARSE),
    "kfac_fallback": lambda: gm.KfacGradientConfig(fallback="adam", fisher=FisherEmp(), **SPARSE),
    "kfac_schedules": lambda: gm.KfacGradientConfig(
        curvature_interval=Linear(first=1, last=4, total=6),
        preconditioner_interval=Stepped(milestones={0: 1, 3: 3}),
        warmup_steps=0,
        start_step=2,
    ),
    "unit_ng": lambda: gm.UnitNaturalGradientConfig(**SPARSE),
    "full_ng": lambda: gm.FullNaturalGradientConfig(fisher=FisherExact(), **SPARSE),
}
STEPS = 8


class Twins(nn.Module):
    """Equal layers, which are stacked, one of which is not called before its time comes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.late, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.norm, self.scale = nn.LayerNorm(4), nn.Parameter(torch.rand(4) + 0.5)
        self.index, self.starts = 0, 3  # of the step, which a repeated call of the model must not move

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(torch.tanh(self.b(torch.tanh(self.a(x))))) * self.scale
        h = torch.tanh(self.late(h)) if self.index >= self.starts else h
        y: Tensor = self.head(h)
        return y


def twins(starts: int = 3) -> Case:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Twins().double()
        model.starts = starts
        return Case(model, torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,)), F.cross_entropy)


def maker_of(model: nn.Module, config: Any) -> Any:
    return next(make for make in gm.METHODS.values() if make.Config is type(config))(model, config)


def batch(case: Case, index: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(index)
    return torch.randn(case.x.shape, generator=generator, dtype=case.x.dtype), case.t.roll(index)


def train(maker: Any, case: Case, start: int, stop: int, lr: float = 0.01) -> None:
    """Plain SGD on what the maker makes."""
    for index in range(start, stop):
        case.model.zero_grad()
        case.model.index = index  # type: ignore[assignment]
        x, t = batch(case, index)
        maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, x), t)
        maker.forward_and_backward()
        with torch.no_grad():
            for p in case.model.parameters():
                if p.grad is not None:
                    p.sub_(p.grad, alpha=lr)


def flat(state: Any, path: str = "") -> dict[str, Any]:
    """Leaves of a nested dictionary by path."""
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in flat(value, f"{path}/{key}").items()}
    return {path: state}


def equal_states(a: Any, b: Any) -> bool:
    left, right = flat(a), flat(b)
    if left.keys() != right.keys():
        return False
    return all(torch.equal(v, right[k]) if isinstance(v, Tensor) else v == right[k] for k, v in left.items())


def through_file(state: Any, folder: Path) -> Any:
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


# --- resuming -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", CONFIGS)
def test_resuming_at_any_step_is_bitwise(name: str, tmp_path: Path) -> None:
    straight = twins()
    reference = maker_of(straight.model, CONFIGS[name]())
    saved = []
    for index in range(STEPS):
        saved.append((copy.deepcopy(straight.model), through_file(reference.state_dict(), tmp_path)))
        train(reference, straight, index, index + 1)
    for index, (model, state) in enumerate(saved):
        case = straight._replace(model=model)
        maker = maker_of(model, CONFIGS[name]())
        maker.load_state_dict(state)
        assert equal_states(maker.state_dict(), state)
        train(maker, case, index, STEPS)
        for p, q in zip(model.parameters(), straight.model.parameters(), strict=True):
            assert torch.equal(p, q), index
        assert equal_states(maker.state_dict(), reference.state_dict()), index


@pytest.mark.parametrize("limits", [(0, 128), (128, 0)], ids=["into stacks", "out of stacks"])
@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "plain"])
@pytest.mark.parametrize("stop", [1, 2, 5])
def test_a_state_loads_where_layers_are_stacked_otherwise(
    stop: int, name: str, limits: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = twins()
    monkeypatch.setattr(gathering, "STACK_LIMIT", limits[0])
    first = maker_of(case.model, CONFIGS[name]())
    train(first, case, 0, stop)
    other = case._replace(model=copy.deepcopy(case.model))
    monkeypatch.setattr(gathering, "STACK_LIMIT", limits[1])
    second = maker_of(other.model, CONFIGS[name]())
    second.load_state_dict(first.state_dict())
    assert name == "full_ng" or len(first.plan.blocks) != len(second.plan.blocks)
    assert equal_states(first.state_dict(), second.state_dict())
    for maker, c in ((first, case), (second, other)):
        if name != "full_ng":
            for block in maker.plan.blocks:
                block.share = 0.0  # where in a period a block is refreshed goes by its cost
        train(maker, c, stop, stop + 4)
    torch.testing.assert_close(dict(case.model.named_parameters()), dict(other.model.named_parameters()), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("starts", [1, 3, 4])
def test_a_layer_that_comes_late_is_treated_as_if_it_were_alone(starts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its first measurement it keeps its plain gradient: an empty statistic would multiply it by ``1 / damping``."""
    results = []
    for limit in (128, 0):
        monkeypatch.setattr(gathering, "STACK_LIMIT", limit)
        case = twins(starts)
        maker = maker_of(case.model, gm.KfacGradientConfig(stagger=False, fisher=FisherExact(), **SPARSE | {"warmup_steps": 0}))
        for index in range(7):
            train(maker, case, index, index + 1)
            late: Any = case.model.get_submodule("late").weight
            results.append(late.grad.clone() if late.grad is not None else torch.zeros(()))
    torch.testing.assert_close(results[:7], results[7:], rtol=1e-9, atol=1e-11)
    at_first = results[starts]  # 1 / damping is 1000: what an empty statistic would make of the plain gradient, about 0.1
    assert 0 < float(at_first.norm()) < 20


# --- what a state is ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", CONFIGS)
def test_a_state_is_a_snapshot_in_both_directions(name: str) -> None:
    case = mlp()
    maker = maker_of(case.model, CONFIGS[name]())
    train(maker, case, 0, 2)
    state = maker.state_dict()
    kept = copy.deepcopy(state)
    train(maker, case, 2, 4)
    assert equal_states(state, kept) and not equal_states(maker.state_dict(), kept)
    other = maker_of(copy.deepcopy(case.model), CONFIGS[name]())
    other.load_state_dict(state)
    train(other, case._replace(model=other.model), 2, 4)
    assert equal_states(state, kept)


@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "plain"])
def test_a_state_holds_tensors_numbers_and_names_by_site(name: str) -> None:
    case = bare_scale()
    maker = maker_of(case.model, CONFIGS[name]())
    train(maker, case, 0, 3)
    state = maker.state_dict()
    sites = {"full"} if name == "full_ng" else {s.name for b in maker.plan.blocks for s in b.sites}
    assert set(state["sites"]) == sites
    for path, leaf in flat(state).items():
        assert type(leaf) in (Tensor, int, float, bool, str, list), path
        if isinstance(leaf, Tensor):
            assert leaf.grad_fn is None and leaf.untyped_storage().nbytes() == leaf.numel() * leaf.element_size(), path


def test_precision_follows_the_maker_that_loads() -> None:
    case = mlp()
    single = gm.KfacGradientMaker(case.model, gm.KfacGradientConfig(dtype="float32"))
    train(single, case, 0, 2)
    double = gm.KfacGradientMaker(case.model, gm.KfacGradientConfig(dtype="float64"))
    double.load_state_dict(single.state_dict())
    for path, leaf in flat(double.state_dict()["sites"]).items():
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            assert leaf.dtype == torch.float64, path
            assert torch.equal(leaf.float(), flat(single.state_dict()["sites"])[path])


# --- what is refused ------------------------------------------------------------------------------------------------------
def _edit(state: Any, path: tuple[str, ...], value: Any) -> Any:
    *first, last = path
    for key in first:
        state = state[key]
    if value is None:
        del state[last]
    else:
        state[last] = value
    return state


WRONG: dict[str, tuple[Callable[[Any], Any], str]] = {
    "not a state": (lambda s: s.clear(), "expected what state_dict"),
    "another kind": (
        lambda s: s["sites"].__setitem__("0", 3) if s.clear() else s.update(step=1, format=3),
        "expected what state_dict",
    ),
    "missing site": (lambda s: _edit(s, ("sites", "2"), None), r"missing \['2'\], unknown \[\]"),
    "unknown site": (lambda s: _edit(s, ("sites", "7"), s["sites"]["2"]), r"unknown \['7'\]"),
    "missing counter": (lambda s: _edit(s, ("skipped",), None), r"missing \['skipped'\]"),
    "missing clock": (lambda s: _edit(s, ("clocks", "method"), None), r"clocks: missing \['method'\]"),
    "missing time": (lambda s: _edit(s, ("clocks", "method", "refresh", "next"), None), r"refresh: missing \['next'\]"),
    "no format": (lambda s: _edit(s, ("format",), None), r"saved by an earlier version, which gave no format.*measure anew"),
    "another format": (lambda s: _edit(s, ("format",), 1), r"of format 1, and format 3 is read"),
    "unknown key": (lambda s: _edit(s, ("extra",), 1), r"unknown \['extra'\]"),
    "missing part": (lambda s: _edit(s, ("sites", "0", "cache"), None), r"0: missing \['cache'\]"),
    "missing tensor": (lambda s: _edit(s, ("sites", "0", "state", "left"), None), r"0: state: missing \['left'\]"),
    "unknown tensor": (lambda s: _edit(s, ("sites", "2", "state", "Z"), torch.zeros(1)), r"2: state: .* unknown \['Z'\]"),
    "shape": (
        lambda s: _edit(s, ("sites", "2", "state", "left"), torch.zeros(1, 9, 9)),
        r"2: state\['left'\] has shape \(1, 9, 9\)",
    ),
    "shape in the cache": (
        lambda s: _edit(
            s, ("sites", "2", "cache", next(k for k, v in s["sites"]["2"]["cache"].items() if v.ndim > 1)), torch.zeros(1, 9)
        ),
        r"2: cache\['.*'\] has shape \(1, 9\)",
    ),
    "unknown in the cache": (lambda s: _edit(s, ("sites", "2", "cache", "Z"), torch.zeros(1)), r"2: cache: .*\['Z'\]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_state_is_named_and_changes_nothing(name: str) -> None:
    case = mlp()
    maker = gm.KfacGradientMaker(case.model)
    train(maker, case, 0, 2)
    edit, text = WRONG[name]
    state, before = maker.state_dict(), maker.state_dict()
    edit(state)
    train(maker, case, 2, 3)
    after = maker.state_dict()
    with pytest.raises(ValueError, match=f"load_state_dict: .*{text}"):
        maker.load_state_dict(state)
    assert equal_states(maker.state_dict(), after)
    maker.load_state_dict(before)
    assert equal_states(maker.state_dict(), before)


@pytest.mark.parametrize(
    ("saved", "loaded", "text"),
    [
        ("kfac_mc", "adam", r"missing \['0.bias', .*'0.weight'.*unknown \['0', '2'\]"),
        ("adam", "shampoo_adam", r"saved as BatchGradient x Diagonal x Division, and is BatchGradient x KronDims x NewtonRoot"),
        ("kfac_mc", "kfac_at_once", r"0 was saved as FisherMC x Kron x Cholesky, and is FisherMC x Kron x Eigh"),
        ("plain", "adam", "expected what state_dict"),
        ("adam", "plain", "expected what state_dict"),
        ("shampoo_adam", "shampoo_adagrad", "saved as"),
    ],
)
def test_a_state_of_another_method_is_refused(saved: str, loaded: str, text: str) -> None:
    case = mlp()
    first, second = (maker_of(case.model, CONFIGS[name]()) for name in (saved, loaded))
    train(first, case, 0, 1)
    with pytest.raises(ValueError, match=text):
        second.load_state_dict(first.state_dict())


def test_a_state_of_another_model_is_refused() -> None:
    first, second = gm.AdamGradientMaker(nn.Linear(3, 2)), gm.AdamGradientMaker(nn.Linear(2, 3))
    with pytest.raises(ValueError, match=r"weight: state\['diagonal'\] has shape \(1, 2, 3\), expected \(1, 3, 2\)"):
        second.load_state_dict(first.state_dict())


# --- between the calls of a step ------------------------------------------------------------------------------------------
def test_a_state_taken_after_a_failed_pass_is_that_from_before() -> None:
    case = mlp()
    maker = gm.KfacGradientMaker(case.model, gm.KfacGradientConfig(warmup_steps=0))
    fresh = maker.state_dict()
    maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x), case.t + 99)
    with pytest.raises(IndexError):
        maker.forward_and_backward()
    assert equal_states(maker.state_dict(), fresh)
    train(maker, case, 0, 1)
    assert maker.silent() == []  # the measurement that was due was made


def test_a_state_taken_amid_a_step_keeps_its_statistics() -> None:
    case = mlp()
    config = gm.KfacGradientConfig(fisher=FisherExact(), warmup_steps=0)
    results = []
    for resume in (False, True):
        maker = gm.KfacGradientMaker(case.model, config)
        case.model.zero_grad()
        for half in (slice(0, 2), slice(2, 6)):
            maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x[half]), case.t[half])
            maker.accumulate((half.stop - half.start) / 6)
            if resume and half.stop == 2:
                other = gm.KfacGradientMaker(case.model, config)
                other.load_state_dict(maker.state_dict())
                maker = other
        maker.precondition()
        results.append(maker.state_dict()["sites"])
    assert equal_states(*results)


PARTS = (slice(0, 2), slice(2, 3), slice(3, 6))


def run_parts(maker: Any, case: Case, index: int, parts: tuple[slice, ...]) -> None:
    x, t = batch(case, index)
    for rows in parts:
        maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, x[rows]), t[rows])
        maker.accumulate((rows.stop - rows.start) / len(x))


def given(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("done", [1, 2, 3])
@pytest.mark.parametrize("method", [m for m in gm.METHODS if m != "gradient"])
def test_a_state_from_amid_a_step_goes_on_bitwise_or_is_refused(method: str, done: int, tmp_path: Path) -> None:
    """Whatever is in ``.grad`` when it is loaded: what was there before the step, and what its parts have brought, is saved."""
    case = suited(method, mlp, linear)
    maker: Any = gm.from_config(case.model, {"method": method})
    train(maker, case, 0, 1)  # whose gradient the next step adds to
    run_parts(maker, case, 1, PARTS[:done])
    state, model, grads = through_file(maker.state_dict(), tmp_path), copy.deepcopy(case.model), given(case.model)
    run_parts(maker, case, 1, PARTS[done:])
    maker.precondition()
    for p, g in zip(model.parameters(), grads, strict=True):
        p.grad = g if done == 1 else None
    other, resumed = gm.from_config(model, {"method": method}), case._replace(model=model)
    other.load_state_dict(state)
    assert equal_states(other.state_dict(), state)
    try:
        run_parts(other, resumed, 1, PARTS[done:])
        other.precondition()
    except RuntimeError as error:
        asked = {what for b in maker.plan.blocks for what in b.triple.curvature.needs}
        assert asked & {"graph", "replay", "previous"} and "step" in str(error), error
        return
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), case.model.parameters(), strict=True))
    if not maker.plan.asks("previous"):  # whose batch is not saved
        assert equal_states(other.state_dict(), maker.state_dict())


def test_secants_of_a_step_that_was_saved_in_parts_are_refused() -> None:
    for method in ("kbfgs", "kbfgs_l", "lbfgs"):
        case = mlp()
        maker: Any = gm.from_config(case.model, {"method": method})
        run_parts(maker, case, 1, PARTS[:1])
        state = maker.state_dict()
        maker.load_state_dict(state)
        with pytest.raises(RuntimeError, match=r"first micro-batches of this one were not saved .*: save between steps"):
            run_parts(maker, case, 1, PARTS[1:])


@pytest.mark.parametrize("option", [{"rescale": "length"}, {"adaptive_damping": {"AdaptiveDamping": {"interval": 1}}}], ids=str)
def test_what_judges_a_step_by_its_batches_refuses_a_part(option: dict[str, Any]) -> None:
    case = mlp()
    maker: Any = gm.from_config(case.model, {"method": "kfac", **option})
    run_parts(maker, case, 1, PARTS[:1])
    maker.load_state_dict(maker.state_dict())
    run_parts(maker, case, 1, PARTS[1:])
    with pytest.raises(RuntimeError, match="save between steps"):
        maker.precondition()


def test_gradients_of_a_step_are_checked_and_let_go_of() -> None:
    case = mlp()
    maker = gm.KfacGradientMaker(case.model)
    between = maker.state_dict()
    run_parts(maker, case, 1, PARTS[:1])
    amid = maker.state_dict()
    for key, name, text in (
        ("step", "0.weight", r"gradients: step\['0.weight'\] has shape \(1,\), expected \(5, 4\)"),
        ("before", "0.wight", r"gradients: before: unknown \['0.wight'\]"),
    ):
        wrong = copy.deepcopy(amid)
        wrong["gradients"][key][name] = torch.zeros(1)
        with pytest.raises(ValueError, match=text):
            maker.load_state_dict(wrong)
    maker.load_state_dict(between)
    case.model.zero_grad()
    train(maker, case, 0, 1)
    other = gm.KfacGradientMaker(mlp().model)
    train(other, case._replace(model=other.model), 0, 1)
    assert equal_states(maker.state_dict(), other.state_dict())


def test_a_plain_maker_saves_between_steps() -> None:
    case = mlp()
    maker = gm.GradientMaker(case.model)
    run_parts(maker, case, 0, PARTS[:1])
    with pytest.raises(RuntimeError, match="save between steps"):
        maker.state_dict()
    run_parts(maker, case, 0, PARTS[1:])
    maker.precondition()
    assert maker.state_dict() == {"format": 3, "step": 1}


def test_a_measured_pass_of_another_loop_is_not_saved() -> None:
    """Its gradient is not the maker's, and not saved: the step begins anew with what was there before."""
    case = mlp()
    optimizer = torch.optim.SGD(case.model.parameters(), 0.01)
    maker = gm.KfacGradientMaker(case.model).attach(optimizer, "categorical")
    states = []
    for run in (case.run, lambda: case.run().backward()):
        run()
        states.append(maker.state_dict())
    assert maker.step_state.now.part == 1 and equal_states(*states)
    optimizer.step()
    assert not equal_states(maker.state_dict(), states[0])


@pytest.mark.parametrize("place", ["prepare", "solve"])
def test_a_state_of_a_step_that_has_failed_lets_it_begin_again(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been folded in is in the state, and is not folded in again."""
    results = []
    for trouble in (True, False):
        case = mlp()
        maker: Any = gm.KfacGradientMaker(case.model, gm.KfacGradientConfig(beta1=0.9))
        train(maker, case, 0, 1)
        run_parts(maker, case, 1, PARTS)
        if trouble:
            with monkeypatch.context() as patch:
                patch.setattr(type(maker.plan.blocks[-1].triple.solver), place, lambda *_: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    maker.precondition()
            other: Any = gm.KfacGradientMaker(case.model, gm.KfacGradientConfig(beta1=0.9))
            other.load_state_dict(maker.state_dict())
            maker = other
            run_parts(maker, case, 1, PARTS)
        maker.precondition()
        results.append((maker.state_dict(), given(case.model)))
    assert equal_states(results[0][0], results[1][0])
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


# --- lifetime -------------------------------------------------------------------------------------------------------------
def hooks(model: nn.Module, *optimizers: torch.optim.Optimizer) -> int:
    stores = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_with_kwargs")
    found = sum(len(getattr(m, store)) for m in model.modules() for store in stores)
    found += sum(len(p._backward_hooks or ()) for p in model.parameters())
    return found + sum(len(o._optimizer_step_pre_hooks) + len(o._optimizer_step_post_hooks) for o in optimizers)


@pytest.mark.parametrize("end", ["remove", "delete"])
@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_maker_that_is_gone_leaves_nothing(name: str, attached: bool, end: str) -> None:
    case = unused() if name == "kfac_mc" else mlp()
    maker = maker_of(case.model, CONFIGS[name]())
    optimizer = torch.optim.SGD(case.model.parameters(), 0.01)
    if attached and name != "plain":
        maker.attach(optimizer, "categorical")
        assert hooks(case.model, optimizer) == 2
        for _ in range(2):
            case.run().backward()
            optimizer.step()
        case.run()  # a pass that is under way
    else:
        train(maker, case, 0, 2)
    reference = weakref.ref(maker)
    if end == "remove":
        maker.remove()
        assert hooks(case.model, optimizer) == 0
        maker.remove()
    del maker
    gc.collect()
    assert reference() is None and hooks(case.model, optimizer) == 0
    case.run().backward()
    optimizer.step()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_model_with_an_attached_maker_is_free_of_it(how: Callable[[Any], Any]) -> None:
    case = mlp()
    optimizer = torch.optim.SGD(case.model.parameters(), 0.01)
    maker = gm.KfacGradientMaker(case.model).attach(optimizer, "categorical")
    case.run().backward()
    optimizer.step()
    clone = how(case.model)
    state = maker.state_dict()
    other = torch.optim.SGD(clone.parameters(), 0.01)
    clone.zero_grad()
    case.loss(clone(case.x), case.t).backward()
    expected = [p.grad.clone() for p in clone.parameters()]
    other.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(clone.parameters(), expected, strict=True))
    assert equal_states(maker.state_dict(), state)
    assert all(
        not getattr(h, "owner", None)
        for m in clone.modules()
        for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
    )


def test_a_maker_may_be_copied_with_its_model() -> None:
    case = mlp()
    maker = gm.KfacGradientMaker(case.model)
    train(maker, case, 0, 2)
    clone = copy.deepcopy(maker)
    assert clone.model is not case.model
    train(maker, case, 2, 4)
    train(clone, case._replace(model=clone.model), 2, 4)
    assert all(torch.equal(p, q) for p, q in zip(case.model.parameters(), clone.model.parameters(), strict=True))
