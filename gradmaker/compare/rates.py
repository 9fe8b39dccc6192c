"""Learning rates and momentum of rows that give none."""

from typing import NamedTuple


class Default(NamedTuple):
    """Learning rates and momentum of SGD for a row that gives none."""

    learning_rates: tuple[float, ...]
    momentum: float


# Four learning rates a row, half a decade apart. Sources: Adam, Kingma & Ba 2015, section 2 (includes 1e-3); AdaGrad,
# torch.optim.Adagrad (includes 1e-2); M-FAC, the authors' code (includes 1e-3); the others, a coarse search on digits. SGD,
# and Shampoo, which by default has the length of SGD's step, have the usual momentum 0.9. Methods with their own average, or
# scaled by an inverse curvature, have none: with 0.9 K-FAC diverged on digits at a tenth of these rates. GGT divides by the
# root of a sum over its window, of whole gradients.
_NATURAL = Default((0.001, 0.003, 0.01, 0.03), 0.0)  # at 0.1 K-FAC diverged on MNIST
_ADAPTIVE = Default((3e-4, 1e-3, 3e-3, 1e-2), 0.0)
_MOMENTUM = Default((0.01, 0.03, 0.1, 0.3), 0.9)
_KEPT = Default((0.003, 0.01, 0.03, 0.1), 0.9)  # at 0.3 one MNIST training in three diverged
_SUMMING = Default((0.003, 0.01, 0.03, 0.1), 0.0)
_ROOTED = Default((0.1, 0.3, 1.0, 3.0), 0.0)
_DAMPED = Default((0.01, 0.03, 0.1, 0.3), 0.0)  # TNT: a damping of 0.1 on every factor makes short steps
_FITTED = Default((0.01, 0.03, 0.1, 0.3), 0.0)  # AdaHessian: 0.15, the authors' code; K-BFGS: 0.3, the paper
_WHOLE = Default((0.03, 0.1, 0.3, 1.0), 0.0)  # steps to the minimum of a quadratic model of the batch: 1 is the full step
_STATED = Default((0.1,), 0.0)  # equals the option `rate` of the method, which has its own momentum
DEFAULTS = {
    "gradient": _MOMENTUM,
    "SGD": _MOMENTUM,
    "shampoo": _KEPT,
    "adam": _ADAPTIVE,
    "adagrad": _SUMMING,
    "Adagrad": _SUMMING,
    "full_adagrad": _SUMMING,
    "one_sided": _KEPT,
    "caspr": _ADAPTIVE,
    "caspr_adaptive": _ADAPTIVE,
    "soap": _ADAPTIVE,
    "eshampoo": _ADAPTIVE,
    "kradagrad_star": _MOMENTUM,
    "kradagrad": _NATURAL,
    "kl_shampoo": _ADAPTIVE,
    "muon": _NATURAL,
    "mfac": _ADAPTIVE,
    "tnt": _DAMPED,
    "ggt": _ROOTED,
    **dict.fromkeys(("newton", "hessian_free", "ksd", "saddle_free", "lissa", "neumann", "curveball"), _WHOLE),
    "adahessian": _FITTED,
    "psgd": _FITTED,
    "psgd_kf": _FITTED,
    "psgd_whiten": _ADAPTIVE,
    "neumann_practical": _STATED,
    "lbfgs": _FITTED,
    "kbfgs": _FITTED,
    "kbfgs_l": _FITTED,
}
FALLBACK = {"maker": _NATURAL, "optimizer": _ADAPTIVE}  # any other maker, any other torch optimizer
