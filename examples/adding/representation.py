"""A representation: the second moment of a matrix by its row sums and its column sums."""

from dataclasses import dataclass

from torch import Tensor

from gradmaker import register
from gradmaker.curvature import Evidence, Gradient, kinds
from gradmaker.representations import Fold, Frame, Representation, State, average


@register
@dataclass(frozen=True, kw_only=True)
class Adafactor(Representation):
    """``diag C ~ r c^T / sum r``, with ``r`` and ``c`` the row and column sums of ``G * G`` for gradients ``G`` of a layer.

    Reference: Shazeer & Stern, ICML 2018, arXiv:1804.04235, section 3.
    """

    takes = kinds(Gradient)
    grain = "layer"

    def init(self, frame: Frame) -> State:
        return {"r": frame.zeros(frame.shape[0]), "c": frame.zeros(frame.shape[1]), "mass": frame.zeros()}

    def update(self, state: State, evidence: Evidence, fold: Fold) -> None:
        for name, axis in (("r", 2), ("c", 1)):
            state[name].mul_(fold.beta).add_(evidence.rows()[0].square().sum(axis), alpha=fold.alpha)
        fold.weigh_(state["mass"])

    def diagonal(self, state: State) -> Tensor:
        r, c = (average(state[name], state["mass"]) for name in ("r", "c"))
        return r.unsqueeze(2) * (c / r.sum(1, keepdim=True).clamp(min=1e-30)).unsqueeze(1)

    def matvec(self, state: State, v: Tensor) -> Tensor:
        return self.diagonal(state) * v

    def to_dense(self, state: State) -> Tensor:
        return self.diagonal(state).flatten(1).diag_embed()
