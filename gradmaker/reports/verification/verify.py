"""`maker.verify()`: the checks of all blocks; the model and the maker do not change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from gradmaker.capture.batch_norms import mixes
from gradmaker.capture.borrowing import borrowing
from gradmaker.linalg.real_pairs import real_dtype
from gradmaker.reports.verification.blocks import check_block
from gradmaker.reports.verification.passes import measure
from gradmaker.reports.verification.result import Check, Verification
from gradmaker.step.protocol import CheckedMaker

__all__ = ["verify"]


def verify(maker: CheckedMaker) -> Verification:
    """Check every block on the declared batch; weights, gradients, buffers, RNG and statistics stay.

    RuntimeError if no batch is declared.
    """
    if not maker.declared:
        raise RuntimeError("verify: declare a batch first, by setup_model_call and setup_loss_call")
    frozen = [name for name, module in maker.model.named_modules() if mixes(module)]
    with _undisturbed(maker.model), torch.enable_grad(), borrowing():
        found = measure(maker)
    with torch.no_grad(), torch.autocast(next(maker.model.parameters()).device.type, enabled=False):
        checks = [check for block in maker.plan.blocks for check in check_block(block, found)]
        checks += [_left(maker.model, name, found.failures[name]) for name in maker.plan.plain if name in found.failures]
    return Verification(checks, frozen, found.notes)


def _left(model: nn.Module, name: str, failure: str) -> Check:
    """A failed check of a parameter that the method had to leave to the plain gradient."""
    return Check(name, real_dtype(model.get_parameter(name)), None, None, None, failure=failure)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Restore buffers and the global random state at the end."""
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers.values():
                buffer.copy_(before)
