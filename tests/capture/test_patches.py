"""The second moment of patches without the patches, against the formed ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker.capture.patches import Patches, Window
from gradmaker.curvature.evidence import Outer

CASES = [
    ((3, 3), (1, 1), (1, 1), (8, 8)),
    ((3, 3), (0, 0), (0, 0), (7, 5)),
    ((3, 3), (0, 2), (1, 0), (6, 9)),
    ((5, 5), (2, 2), (2, 2), (9, 7)),
    ((4, 2), (1, 2), (0, 1), (6, 6)),
    ((1, 3), (0, 0), (1, 1), (4, 5)),
    ((3, 1), (1, 1), (0, 0), (4, 5)),
    ((2, 2), (3, 0), (0, 3), (5, 4)),  # more padding than kernel
]


def formed(images: Tensor, window: Window) -> Tensor:
    padded = F.pad(images, (*window.columns, *window.rows))
    return F.unfold(padded, window.kernel).mT.unsqueeze(0)  # (1, N, r, i)


def made(kernel: tuple[int, int], rows: tuple[int, int], columns: tuple[int, int], space: tuple[int, int]) -> Patches:
    torch.manual_seed(0)
    images = torch.randn(3, 4, *space, dtype=torch.float64)
    window = Window(kernel, rows, columns)
    return Patches(images, window, lambda: formed(images, window), 3)


@pytest.mark.parametrize("case", CASES)
def test_moment_and_total_are_those_of_formed_patches(case: tuple[tuple[int, int], ...]) -> None:
    patches = made(*case)
    a = formed(patches.images, patches.window)[0].flatten(0, 1)
    assert patches.shape == (1, 3, len(a) // 3, a.shape[1])
    torch.testing.assert_close(patches.moment()[0], a.T @ a, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(patches.total()[0], a.sum(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_evidence_folds_the_same_moment(bias: bool, beta: float) -> None:
    patches = made(*CASES[0])
    plain = formed(patches.images, patches.window)
    g = torch.randn(1, 1, *plain.shape[1:3], 2, dtype=torch.float64)
    start = torch.randn(1, plain.shape[-1] + bias, plain.shape[-1] + bias, dtype=torch.float64)
    start = start + start.mT
    found, expected = start.clone(), start.clone()
    Outer(patches, g, bias).add_input_moment_(found, beta, 0.3)
    Outer(plain, g, bias).add_input_moment_(expected, beta, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_any_operation_forms_the_patches() -> None:
    patches = made(*CASES[0])
    plain = formed(patches.images, patches.window)
    for operation in (lambda x: x * 2, lambda x: x[..., :3], lambda x: x.flatten(1, 2), lambda x: torch.cat([x, x], 2)):
        found = operation(patches)
        assert type(found) is Tensor
        assert torch.equal(found, operation(plain))


def test_wide_layers_of_stride_one_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """K-FAC never forms the patches of such a layer, and has the same factors as with them."""
    from gradmaker import KfacGradientConfig, KfacGradientMaker

    def factors(short: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.Flatten(), nn.Linear(16 * 64, 3)).double()
        x, t = torch.randn(4, 16, 8, 8, dtype=torch.float64), torch.randint(3, (4,))
        formed_by = []
        with monkeypatch.context() as patch:
            if not short:
                patch.setattr(Window, "pays", lambda *_: False)
            new = Patches.__new__
            patch.setattr(Patches, "__new__", lambda c, i, w, f, n: new(c, i, w, lambda: (formed_by.append(1), f())[1], n))
            maker = KfacGradientMaker(model, KfacGradientConfig(max_dim=2000))
            maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, x), t)
            maker.forward_and_backward()
        assert not formed_by
        return [p.grad for p in model.parameters() if p.grad is not None]

    for a, b in zip(factors(True), factors(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", ["kfac", "ekfac", "smw_ng", "skfac"])
def test_inputs_that_a_loop_writes_into_later_are_those_of_the_pass(method: str) -> None:
    """What holds rows until the end of the step has formed them by then."""
    from gradmaker import from_config

    def gradients(spoil: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.Flatten(), nn.Linear(16 * 64, 3)).double()
        x, t = torch.randn(4, 16, 8, 8, dtype=torch.float64), torch.randint(3, (4,))
        maker = from_config(model, {"method": method})
        maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, x), t)
        maker.accumulate()
        if spoil:
            x.fill_(7.0)
        maker.precondition()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for a, b in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(a, b)
