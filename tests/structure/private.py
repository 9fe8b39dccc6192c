"""Names with an underscore in front, used in another file than the one that defines them."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from tests.structure.sources import LIBRARY, Source

OF_TORCH = frozenset(
    {
        "_C",
        "_are_functorch_transforms_active",
        "_autograd",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_base",  # of a view
        "_buffers",
        "_cdata",  # of a storage
        "_current_graph_task_id",
        "_dynamo",
        "_execution_engine",
        "_fsdp_param_group",  # of the state of a module that fully_shard has sharded
        "_fsdp_param_groups",  # the same in later versions
        "_functorch",
        "_fused_adagrad_",
        "_fused_adamw_",
        "_get_backend",  # of a process group
        "_get_fsdp_state",  # of such a module
        "_get_raw",  # of a formula of FLOPs that takes tensors
        "_get_tracing_state",
        "_global_backward_hooks",
        "_global_forward_hooks",
        "_in_projection",
        "_in_projection_packed",
        "_join_config",  # of DistributedDataParallel
        "_linalg_eigh",
        "_linalg_solve_ex",
        "_linalg_svd",
        "_local_scalar_dense",
        "_make_wrapper_subclass",
        "_modules",
        "_optimizer_step_pre_hooks",
        "_parameters",
        "_post_accumulate_grad_hooks",
        "_reversed_padding_repeated_twice",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
        "_schema",
        "_timeout",  # of the options of a backend
        "_top_saved_tensors_default_hooks",
        "_unsharded_param",  # of one of its parameters
        "_version",  # how often a tensor was written to
    }
)
OF_PYTHON = frozenset({"_fields"})  # of a named tuple
ALLOWED = OF_TORCH | OF_PYTHON
"""Attributes without a public name, of classes that are not ours; `torch._foreach_*` besides."""

OWN = ("self", "cls")
BY_NAME = ("getattr", "setattr", "hasattr", "delattr")


@dataclass(frozen=True, order=True)
class Use:
    """Of one private name."""

    path: str
    line: int
    said: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.said}"


def is_private(name: str) -> bool:
    return name.startswith("_") and name.strip("_") != "" and not (name.startswith("__") and name.endswith("__"))


def uses(sources: Mapping[str, Source], allowed: Collection[str] = ALLOWED) -> list[Use]:
    """Private names of other files: ``other._x`` and ``from m import _x``."""
    found = []
    for source in sources.values():
        defined = definitions(source.tree)
        for name, receiver, line in _accesses(source.tree):
            if not _is_own(receiver) and name not in defined and not _is_allowed(name, allowed):
                found.append(Use(source.path, line, f"{ast.unparse(receiver)}.{name}"))
        found += _imports(source)
    return sorted(found)


def inherited(sources: Mapping[str, Source]) -> list[Use]:
    """``self._x`` of a base class in another file."""
    defined = {module: definitions(source.tree) for module, source in sources.items()}
    everywhere = set().union(*defined.values())
    found = {
        Use(source.path, line, f"{ast.unparse(receiver)}.{name}")
        for source in sources.values()
        for name, receiver, line in _accesses(source.tree)
        if _is_own(receiver) and name in everywhere - defined[source.module]
    }
    return sorted(found)


def unused(sources: Mapping[str, Source], allowed: Collection[str] = ALLOWED) -> list[str]:
    """Allowed names that no file accesses."""
    return sorted(set(allowed) - {name for source in sources.values() for name, _, _ in _accesses(source.tree)})


# --- definitions ----------------------------------------------------------------------------------------------------------
def definitions(tree: ast.AST) -> set[str]:
    """Private functions, classes, variables, fields and attributes of ``self``. Members of a protocol are those of others."""
    found = set()
    for node in _outside_protocols(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_own(node.value):
            found.add(node.attr)
        elif isinstance(node, ast.Call) and (name := _set_by_name(node)):
            found.add(name)
    return {name for name in found if is_private(name)}


def _outside_protocols(tree: ast.AST) -> Iterator[ast.AST]:
    yield tree
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.ClassDef) and any(_name(base) == "Protocol" for base in node.bases)):
            yield from _outside_protocols(node)


def _set_by_name(call: ast.Call) -> str | None:
    """``_x`` of ``object.__setattr__(self, "_x", ...)``, which frozen dataclasses need."""
    by_name = _name(call.func) in ("__setattr__", "setattr") and len(call.args) == 3 and _is_own(call.args[0])
    return _text(call.args[1]) if by_name else None


def _is_allowed(name: str, allowed: Collection[str]) -> bool:
    return name in allowed or name.startswith("_foreach_")


# --- uses -----------------------------------------------------------------------------------------------------------------
def _accesses(tree: ast.AST) -> Iterator[tuple[str, ast.expr, int]]:
    """Name, receiver and line of private attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.attr, node.value, node.lineno
        elif isinstance(node, ast.Call) and _name(node.func) in BY_NAME and len(node.args) > 1:
            name = _text(node.args[1])
            if name is not None and is_private(name):
                yield name, node.args[0], node.lineno


def _imports(source: Source) -> Iterator[Use]:
    """Private names, and private modules of another folder."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom) and (node.module or LIBRARY).split(".")[0] == LIBRARY:
            for alias in node.names:
                if is_private(alias.name) or any(map(is_private, _apart(node.module or LIBRARY, source))):
                    yield Use(source.path, node.lineno, f"from {node.module} import {alias.name}")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == LIBRARY and any(map(is_private, _apart(alias.name, source))):
                    yield Use(source.path, node.lineno, f"import {alias.name}")


def _apart(module: str, source: Source) -> list[str]:
    """Parts of a module's name past the folder of a source, where it lies in there; else all."""
    parts, own = module.split("."), source.module.split(".")
    folder = own if source.package else own[:-1]
    return parts[len(folder) + 1 :] if parts[: len(folder)] == folder else parts


def _is_own(receiver: ast.expr) -> bool:
    """``self``, ``cls``, ``super()``, ``type(self)``."""
    if isinstance(receiver, ast.Call):
        return _name(receiver.func) == "super" or (_name(receiver.func) == "type" and all(map(_is_own, receiver.args)))
    return isinstance(receiver, ast.Name) and receiver.id in OWN


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Subscript):
        return _name(node.value)
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _text(node: ast.expr) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None
