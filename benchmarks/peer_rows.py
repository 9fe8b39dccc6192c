"""Rows of other libraries in the comparison, with settings equal to those of this library's rows where they have them.

All are optional: `pip install -c constraints.txt -e '.[bench]'`. A row whose library is missing is an error in its cell.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ContextDecorator
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from own_rows import NEVER, Make, Row, Step, of_torch
from torch import nn
from workloads import Case

EVERY = {"plain": NEVER, "stat": NEVER, "T1": 1, "T10": 10}
"""The interval of refreshes by kind of step."""
SOME = ("stat", "T1", "T10")  # of those that update their statistics at every step
ALONE = ("plain", "T1", "T10")  # of those that measure and refresh in one
SHARE = {"plain": 0.0, "stat": 0.0, "T1": 1.0, "T10": 0.1}


def _on_top(case: Case, rate: float, momentum: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(case.model.parameters(), lr=rate, momentum=momentum)


# ------------------------------------------------------------------ ASDL
class Unmarked(ContextDecorator):
    """A mark for a profiler that is not there."""

    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...


def asdl(make: Callable[[Any, Any], Any], momentum: float = 0.9, **options: Any) -> Make:
    """A step of one of its makers. Embeddings and norms are left out: it crashes on them, or has no blocks for them."""

    def made(case: Case, kind: str, rate: float) -> Step:
        warnings.filterwarnings("ignore", module="asdl")
        torch.cuda.nvtx.range = lambda *_: Unmarked()  # type: ignore[assignment]  # marks need a build for CUDA
        config = import_module("asdl.precondition.prec_grad_maker").PreconditioningConfig(
            data_size=case.t.numel(),
            preconditioner_upd_interval=EVERY[kind],
            curvature_upd_interval={"plain": NEVER, "stat": 1}.get(kind, EVERY[kind]),
            ignore_modules=[nn.Embedding, nn.LayerNorm],
            **{"damping": 1e-3, **options},
        )
        maker, optimizer = make(case.model, config), _on_top(case, rate, momentum)

        def step() -> None:
            optimizer.zero_grad()
            y = maker.setup_model_call(case.model, case.x)
            declare_to_asdl(maker, case, y)
            maker.forward_and_backward()
            optimizer.step()

        return step

    return made


def declare_to_asdl(maker: Any, case: Case, y: Any) -> None:
    if case.tokens:
        y = y.flatten(0, 1)
        maker.setup_logits_repr(y)
    maker.setup_loss_call(F.cross_entropy, y, case.t.flatten())


def asdl_ekfac(model: nn.Module, config: Any) -> Any:
    """Repaired: the release overrides methods that nothing calls, and returns the raw gradient."""
    made = import_module("asdl.precondition.natural_gradient")

    class Repaired(made.EkfacGradientMaker):  # type: ignore[misc, name-defined]
        def update_preconditioner(self, *args: Any, **kwargs: Any) -> None:
            pass

        def precondition(self, vectors: Any = None, grad_scale: Any = None, use_inv: bool = False) -> None:
            made.NaturalGradientMaker.precondition(self, vectors=vectors, grad_scale=grad_scale, use_inv=False)

    return Repaired(model, config, fisher_type="fisher_emp")


def asdl_kbfgs(model: nn.Module, config: Any) -> Any:
    """Repaired: the release updates a copy of the inverse, which it drops."""
    made = import_module("asdl.precondition.kbfgs")

    def update(H: torch.Tensor, s: torch.Tensor, y: torch.Tensor) -> None:
        sty, Hy = s @ y, H @ y
        Hyst = torch.outer(Hy, s)
        H.add_(torch.outer(s, s), alpha=float((sty + y @ Hy) / sty**2)).sub_((Hyst + Hyst.T) / sty)

    made.bfgs_inv_update_ = update
    return made.KronBfgsGradientMaker(model, config)


def of_asdl(name: str, **options: Any) -> Callable[[Any, Any], Any]:
    return lambda model, config: getattr(import_module("asdl"), name)(model, config, **options)


def asdl_smw(case: Case, kind: str, rate: float, momentum: float = 0.9) -> Step:
    """SMW-NG has a config of its own."""
    made = import_module("asdl.precondition.smw")
    config = made.SmwEmpNaturalGradientConfig(data_size=case.t.numel(), damping=1e-3)
    maker, optimizer = made.SmwEmpNaturalGradientMaker(case.model, config), _on_top(case, rate, momentum)

    def step() -> None:
        optimizer.zero_grad()
        y = maker.setup_model_call(case.model, case.x)
        maker.setup_loss_call(F.cross_entropy, y, case.t, reduction="none")
        maker.forward_and_backward()
        optimizer.step()

    return step


# ------------------------------------------------------------------ optimizers
def heavyball(name: str, **options: Any) -> Make:
    """Eager: its compiled steps take minutes to build, and its clock of refreshes is in Python either way."""

    def made(case: Case, kind: str, rate: float) -> Step:
        library = import_module("heavyball")
        library.utils.compile_mode = None
        given = {key: value(kind) if callable(value) else value for key, value in options.items()}
        return of_torch(lambda ps, lr: getattr(library, name)(ps, lr=lr, **given))(case, kind, rate)

    return made


def pytorch_optimizer(name: str, **options: Any) -> Make:
    def made(case: Case, kind: str, rate: float) -> Step:
        given = {key: value(kind) if callable(value) else value for key, value in options.items()}
        make = getattr(import_module("pytorch_optimizer"), name)
        return of_torch(lambda ps, lr: make(ps, lr=lr, **given))(case, kind, rate)

    return made


def torchzero(name: str, **options: Any) -> Make:
    """A module of it with a learning rate."""

    def made(case: Case, kind: str, rate: float) -> Step:
        tz = import_module("torchzero")
        given = {key: value(kind) if callable(value) else value for key, value in options.items()}
        module = getattr(tz.m, name)(**given)
        return of_torch(lambda ps, lr: tz.Optimizer(ps, module, tz.m.LR(lr)))(case, kind, rate)

    return made


def psgd_torch(kind_of_fit: str) -> Make:
    """Its own loop with a closure; the probability of an update is set before every step, so that windows are whole."""

    def made(case: Case, kind: str, rate: float) -> Step:
        fitted = import_module("psgd_torch").Kron(
            list(case.model.parameters()),
            preconditioner_type=kind_of_fit,
            preconditioner_init_scale=1.0,
            lr_params=rate,
            momentum=0.9,
        )
        done = 0

        def step() -> None:
            nonlocal done
            fitted.preconditioner_update_probability = float(done % EVERY[kind] == 0)
            fitted.step(lambda: case.loss(case.model(case.x)))
            done += 1

        return step

    return made


def singd(case: Case, kind: str, rate: float) -> Step:
    """Inverse-free K-FAC with dense factors and the empirical Fisher matrix."""
    make = import_module("singd.optim.optimizer").SINGD
    average = "batch+sequence" if case.tokens else "batch"
    optimizer = make(case.model, lr=rate, T=EVERY[kind], loss_average=average, warn_unsupported=False)
    return of_torch(lambda *_: optimizer)(case, kind, rate)


def sirfshampoo(case: Case, kind: str, rate: float) -> Step:
    make = import_module("sirfshampoo").SIRFShampoo
    return of_torch(lambda *_: make(case.model, lr=rate, T=EVERY[kind]))(case, kind, rate)


def matrices(make: Callable[[Any, float], torch.optim.Optimizer]) -> Make:
    """An optimizer for matrices, with the fused AdamW for all other parameters."""

    def made(case: Case, kind: str, rate: float) -> Step:
        parameters = list(case.model.parameters())
        own = make([p for p in parameters if p.ndim == 2], rate)
        rest = torch.optim.AdamW([p for p in parameters if p.ndim != 2], lr=rate, fused=True)

        def step() -> None:
            case.model.zero_grad()
            case.loss(case.model(case.x)).backward()
            own.step()
            rest.step()

        return step

    return made


ASDL = {"ema_decay": 0.05}  # the weight of the new statistic
ASDL_KFAC = "KfacGradientMaker"
PEERS = (
    Row("ASDL kfac", "kfac", "asdfghjkl", asdl(of_asdl(ASDL_KFAC, fisher_type="fisher_mc"), **ASDL)),
    Row("ASDL kfac-emp", "kfac", "asdfghjkl", asdl(of_asdl(ASDL_KFAC, fisher_type="fisher_emp"), **ASDL)),
    Row("SINGD", "inverse-free", "singd", singd, ALONE, "of the kind of kfac-emp"),
    Row("ASDL kfac, no average", "kfac0", "asdfghjkl", asdl(of_asdl(ASDL_KFAC, fisher_type="fisher_mc")), ALONE),
    Row("ASDL skfac", "kfac0", "asdfghjkl", asdl(of_asdl(ASDL_KFAC, fisher_type="fisher_mc", swift=True)), ALONE),
    Row("ASDL ekfac", "ekfac", "asdfghjkl", asdl(asdl_ekfac), ALONE, "repaired: the release returns the raw gradient"),
    Row("ASDL shampoo", "shampoo", "asdfghjkl", asdl(of_asdl("ShampooGradientMaker"), damping=1e-6, **ASDL)),
    Row(
        "pytorch_optimizer ScalableShampoo",
        "shampoo",
        "pytorch_optimizer",
        pytorch_optimizer(
            "ScalableShampoo",
            block_size=1024,
            start_preconditioning_step=1,
            use_svd=False,
            statistics_compute_steps=lambda kind: {"plain": NEVER, "stat": 1}.get(kind, EVERY[kind]),
            preconditioning_compute_steps=EVERY.__getitem__,
        ),
    ),
    Row("SIRFShampoo", "inverse-free", "sirfshampoo", sirfshampoo, ALONE, "of the kind of shampoo"),
    Row(
        "HeavyBall SOAP",
        "soap",
        "heavyball",
        heavyball("SOAP", betas=(0.95, 0.95), weight_decay=0.0, precondition_frequency=EVERY.__getitem__),
        SOME,
    ),
    Row(
        "pytorch_optimizer SOAP",
        "soap",
        "pytorch_optimizer",
        pytorch_optimizer("SOAP", weight_decay=0.0, precondition_frequency=EVERY.__getitem__),
        SOME,
    ),
    Row("torchzero SOAP", "soap", "torchzero", torchzero("SOAP", precond_freq=EVERY.__getitem__), SOME),
    Row(
        "HeavyBall KLShampoo",
        "kl_shampoo",
        "heavyball",
        heavyball("KLShampoo", betas=(0.9, 0.98), weight_decay=0.0, precondition_frequency=EVERY.__getitem__),
        SOME,
    ),
    Row("psgd_torch Kron", "psgd_whiten", "psgd_torch", psgd_torch("whitening"), ALONE, "triangular factors (2024)"),
    Row(
        "HeavyBall PSGDPRO",
        "psgd_whiten",
        "heavyball",
        heavyball("PSGDPRO", preconditioner_update_probability=SHARE.__getitem__),
        ALONE,
    ),
    Row(
        "pytorch_optimizer Kron",
        "psgd_whiten",
        "pytorch_optimizer",
        pytorch_optimizer("Kron", pre_conditioner_update_probability=SHARE.__getitem__),
        ("plain", "T1"),
        "refreshes at random: whole windows cannot be set",
    ),
    Row("ASDL psgd_kf", "psgd_kf", "asdfghjkl", asdl(of_asdl("KronPsgdGradientMaker")), ALONE),
    Row("psgd_torch Kron, Newton", "psgd_kf", "psgd_torch", psgd_torch("Newton"), ALONE, "a factor for each tensor"),
    Row("ASDL kbfgs", "kbfgs", "asdfghjkl", asdl(asdl_kbfgs, damping=0.3, ema_decay=0.1), ALONE, "repaired: see the code"),
    Row("ASDL seng", "seng", "asdfghjkl", asdl(of_asdl("SengGradientMaker"), damping=0.05), ALONE, "sketches of 256"),
    Row("ASDL smw", "smw_ng", "asdfghjkl", asdl_smw, ("T1",)),
    Row(
        "torch Muon", "muon", "torch", matrices(lambda ps, lr: torch.optim.Muon(ps, lr, weight_decay=0.0)), ("T1",), "bfloat16"
    ),
    Row("pytorch_optimizer Muon", "muon", "pytorch_optimizer", matrices(lambda ps, lr: _muon(ps, lr)), ("T1",), "bfloat16"),
    Row("torch AdamW, fused", "adam", "torch", of_torch(lambda ps, lr: torch.optim.AdamW(ps, lr, fused=True)), ("T1",)),
    Row("torch Adagrad, fused", "adagrad", "torch", of_torch(lambda ps, lr: torch.optim.Adagrad(ps, lr, fused=True)), ("T1",)),
)


def _muon(parameters: Any, lr: float) -> torch.optim.Optimizer:
    make = import_module("pytorch_optimizer").Muon
    made: torch.optim.Optimizer = make([{"params": parameters, "use_muon": True}], lr=lr)
    return made
