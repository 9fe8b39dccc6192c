"""Passes that are recorded run eagerly: in compiled code hooks on modules may not fire, and a backward pass runs only once."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["Eager", "keep_out_of_compilation", "set_compiler"]

set_compiler: Any = torch._C._dynamo.eval_frame.set_eval_frame
"""Sets what compiles the frames of this thread, None for nothing, and returns what did."""


class Eager:
    """Context in which compiled functions and modules run eagerly, also the one whose call has begun.

    The passes of several makers on one model end in the order in which they began: the last one restores the compiler.
    """

    open = 0  # number of open contexts
    compiling = False  # whether the hook that runs was called within compiled code
    stance: Any = None  # of torch's compiler, outside of them
    compiler: Any = None  # of the call that has begun

    def __enter__(self) -> None:
        if not Eager.open:
            Eager.stance = torch.compiler.set_stance("force_eager")
        Eager.open += 1

    def __exit__(self, *_: object) -> None:
        Eager.open -= 1
        if not Eager.open:
            Eager.stance.__exit__(None, None, None)
            Eager.stance = None

    @classmethod
    def leave_hook(cls, before: int, compiler: Any) -> None:
        """Let a compiler go on after a hook, or pause while the pass that it began is open.

        before, compiler: the number of open contexts and what compiled when the hook was called
        """
        if cls.open and not before:
            cls.compiler, compiler = compiler, None
        elif before and not cls.open:
            cls.compiler, compiler = None, compiler or cls.compiler
        set_compiler(compiler)


def keep_out_of_compilation(hook: Any) -> None:
    """Have a hook run as Python, between the graphs of a compiled model.  hook: the function

    The first optimizer imports torch's compiler.
    """
    torch._dynamo.decorators.skip(hook)
