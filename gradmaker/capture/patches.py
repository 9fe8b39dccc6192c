"""Patches of a convolution's input, formed when they are needed, and their second moment without them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

__all__ = ["Patches", "Window"]


@dataclass(frozen=True)
class Window:
    """A kernel that visits an image at every position, and the zeros around the image: before and after each axis."""

    kernel: tuple[int, int]
    rows: tuple[int, int]
    columns: tuple[int, int]

    def positions(self, height: int, width: int) -> tuple[int, int]:
        """The number of positions along each axis."""
        (a, b), (k, m) = (sum(self.rows) + height, sum(self.columns) + width), self.kernel
        return a - k + 1, b - m + 1

    def lags(self) -> list[tuple[int, int]]:
        """Displacements between two entries of a kernel, one of each pair of opposite ones."""
        k, m = self.kernel
        return [(y, x) for y in range(k) for x in range(1 - m, m) if y or x >= 0]

    def pays(self, images: Tensor) -> bool:
        """Whether products of displaced images, and of patches at the border, take less than half of those of all patches."""
        N, C, height, width = images.shape
        k, m = self.kernel
        if C < 16 or height < k or width < m or k * m == 1:  # narrow products run far below the rate of wide ones
            return False
        up, left = self.positions(height, width)
        whole = len(self.lags()) * (height + k - 1) * (width + m - 1)
        across, down = width + m - 1, up
        border = sum(across * ((k - s) * m) ** 2 for before in self.rows for s in range(before + 1, k))
        border += sum(down * (k * (m - s)) ** 2 for before in self.columns for s in range(before + 1, m))
        return 2 * (whole + border) < up * left * (k * m) ** 2


class Patches(Tensor):
    """The inputs ``a`` (1, n, r, C k m) of a convolution with stride one: any operation on it forms the patches.

    `moment` does not: the sum of ``a a^T`` over all positions at which the kernel touches the image depends on the
    displacement between two of its entries alone, and is made of products of the image with itself, displaced. Positions
    beyond the padding, where patches are mostly zero, are subtracted. For a kernel of 3 x 3 that is 13 products of C
    channels for 81.
    """

    images: Tensor
    window: Window
    form: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, images: Tensor, window: Window, form: Callable[[], Tensor], examples: int) -> Patches:
        """images: (N, C, height, width); form: makes the patches; examples: n"""
        N, C, *space = images.shape
        (up, left), (k, m) = window.positions(space[0], space[1]), window.kernel
        shape = (1, examples, N * up * left // examples, C * k * m)
        made: Patches = Tensor._make_wrapper_subclass(cls, shape, dtype=images.dtype, device=images.device)
        made.images, made.window, made.form = images.detach(), window, form
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():  # results are no patches
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(Patches, lambda x: x.form().contiguous(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def total(self) -> Tensor:
        """``sum_nr a``.  # (1, i)"""
        window = self.window
        up, left = window.positions(*self.images.shape[2:])
        summed = F.pad(self.images.sum(0), (*window.columns, *window.rows))  # (C, ...)
        return summed.unfold(1, up, 1).unfold(2, left, 1).sum((3, 4)).reshape(1, -1)

    def moment(self) -> Tensor:
        """``sum_nr a a^T``.  # (1, i, i)"""
        C = self.images.shape[1]
        k, m = self.window.kernel
        out = self.images.new_empty(C, k, m, C, k, m)
        for (y, x), R in self._displaced():
            for u in range(max(0, -y), min(k, k - y)):
                for v in range(max(0, -x), min(m, m - x)):
                    out[:, u, v, :, u + y, v + x] = R
                    out[:, u + y, v + x, :, u, v] = R.T
        self._subtract_border_(out)
        return out.view(1, C * k * m, C * k * m)

    def _displaced(self) -> list[tuple[tuple[int, int], Tensor]]:
        """``sum_q x_q x_(q + lag)^T`` over all images, which are zero outside, for each lag.  # (C, C)"""
        k, m = self.window.kernel
        padded = F.pad(self.images.permute(0, 2, 3, 1), (0, 0, 0, m - 1, 0, k - 1))  # one row runs into zeros of the next
        pixels = padded.reshape(-1, padded.shape[-1])
        found = []
        for y, x in self.window.lags():
            offset = y * padded.shape[2] + x
            found.append(((y, x), pixels[: len(pixels) - offset].T @ pixels[offset:]))
        return found

    def _subtract_border_(self, out: Tensor) -> None:
        """Subtract what positions outside of the padding have added: their patches hold few rows or columns of the image."""
        x, window = self.images, self.window
        (k, m), (height, width) = window.kernel, x.shape[2:]
        for s in range(window.rows[0] + 1, k):  # above: the first rows of the image, under the last ones of the kernel
            _subtract_(out[:, s:, :, :, s:, :], F.pad(x[:, :, : k - s], (m - 1, m - 1)).unfold(3, m, 1), across=True)
        for s in range(window.rows[1] + 1, k):
            _subtract_(
                out[:, : k - s, :, :, : k - s, :], F.pad(x[:, :, height - k + s :], (m - 1, m - 1)).unfold(3, m, 1), across=True
            )
        inside = (0, 0, *window.rows)  # positions above and below are done
        for s in range(window.columns[0] + 1, m):
            _subtract_(out[:, :, s:, :, :, s:], F.pad(x[..., : m - s], inside).unfold(2, k, 1), across=False)
        for s in range(window.columns[1] + 1, m):
            _subtract_(out[:, :, : m - s, :, :, : m - s], F.pad(x[..., width - m + s :], inside).unfold(2, k, 1), across=False)


def _subtract_(out: Tensor, patches: Tensor, across: bool) -> None:
    """out: (C, a, b, C, a, b).  patches: (N, C, a, positions, b) across, or (N, C, positions, b, a)"""
    C, a, b = out.shape[:3]
    rows = patches.permute(0, 3, 1, 2, 4) if across else patches.permute(0, 2, 1, 4, 3)
    rows = rows.reshape(-1, C * a * b)
    out -= (rows.T @ rows).view(C, a, b, C, a, b)
