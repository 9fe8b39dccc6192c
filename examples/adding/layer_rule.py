"""A layer rule: `nn.Bilinear`, which is a generic parameter without one."""

from torch import Tensor, nn

from gradmaker import register
from gradmaker.capture.rules.calls import Call, LayerRule, Layout, to_examples


@register
class BilinearRule(LayerRule):
    """``y_o = x^T W_o z + b_o``: a linear map of the products ``a = vec(x z^T)``, with the weight as a matrix (o, i j).

    Reference: Tenenbaum & Freeman, Neural Computation 2000.
    """

    types = (nn.Bilinear,)

    def shape(self, module: nn.Bilinear) -> tuple[int, int, int]:
        return 1, module.out_features, module.in1_features * module.in2_features

    def inputs(self, module: nn.Bilinear, call: Call, layout: Layout) -> Tensor:
        x, z = (to_examples(value, layout, axes=1) for value in _given(*call.args, **call.kwargs))  # (n, r, i), (n, r, j)
        return (x.unsqueeze(-1) * z.unsqueeze(-2)).flatten(-2).unsqueeze(0)

    def gradients(self, module: nn.Bilinear, call: Call, g: Tensor, layout: Layout) -> Tensor:
        return to_examples(g, layout, axes=1, lead=1).unsqueeze(1)


def _given(input1: Tensor, input2: Tensor) -> tuple[Tensor, Tensor]:
    """The arguments of `nn.Bilinear.forward`, by position or by name."""
    return input1, input2
