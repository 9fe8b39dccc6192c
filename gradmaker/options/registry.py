"""Registries of methods, parts, layer rules and grafting rules by name, filled by `register`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from typing import Any, ClassVar, Protocol, TypeVar, overload

from torch import nn

from gradmaker.options.suggestions import did_you_mean

__all__ = ["METHODS", "Method", "Registry", "register", "temporary_registrations"]

T = TypeVar("T")


class Registry(Mapping[str, T]):
    """The registered entries of one kind by name, in the order of registration."""

    known: ClassVar[list[Registry[Any]]] = []

    def __init__(self, kind: str, base: type, *, named: bool = False, instances: bool = False) -> None:
        """An empty registry, which `register` fills with what derives from ``base``.

        Args:
            kind: noun for an entry in errors, as in ``a solver``.
            base: base class of entries.
            named: whether `register` gets a name; else it is that of the class, as configs are written and printed.
            instances: whether entries are instances, for a class made without arguments; else they are classes.
        """
        self.kind, self.base, self.named, self.instances = kind, base, named, instances
        self.entries: dict[str, T] = {}
        Registry.known.append(self)

    def __getitem__(self, name: str) -> T:
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.kind}: {', '.join(self)})"

    def find(self, option: str, name: object) -> T:
        """The entry that an option names. ValueError for an unknown name, with all legal names and a close one."""
        if not isinstance(name, str) or name not in self:
            raise ValueError(f"{option}={name!r}: {did_you_mean(name, self)}")
        return self[name]

    def takes(self, given: object) -> bool:
        """Whether an object is of this kind."""
        derived = isinstance(given, type) and issubclass(given, self.base)
        return derived or (self.instances and isinstance(given, self.base))

    def add(self, name: str | None, given: Any) -> None:
        """Register an object of this kind. ValueError for an object that its name could not make, or a name that is taken."""
        own = given.__name__ if isinstance(given, type) else type(given).__name__
        if name is None and self.named:
            raise ValueError(f"register: a {self.kind} is registered by a name: register('...', {own})")
        if name is not None and not self.named and name != own:
            raise ValueError(f"register({name!r}, {own}): a {self.kind} bears the name of its class, which configs print")
        if reason := self.unfit(given):
            raise ValueError(f"register: {own} {reason}")
        entry = given() if self.instances and isinstance(given, type) else given
        name = own if name is None else name
        if name in self.entries and not _made_again(self.entries[name], entry):
            raise ValueError(f"register: the {self.kind} {name!r} is registered already, as {self.entries[name]!r}")
        self.entries[name] = entry

    def unfit(self, given: Any) -> str | None:
        """Why an object of this kind cannot be registered; None if it can."""
        if not isinstance(given, type):
            return None
        if missing := sorted(getattr(given, "__abstractmethods__", ())):
            return f"is abstract: it lacks {', '.join(missing)}"
        if self.instances:
            return None
        if "__dataclass_fields__" not in vars(given):
            return "is no dataclass: write @register above @dataclass(frozen=True, kw_only=True)"
        needed = [f.name for f in fields(given) if f.init and f.default is MISSING and f.default_factory is MISSING]
        return f"has to be made without arguments too: give a default to {', '.join(needed)}" if needed else None


def _made_again(old: Any, new: Any) -> bool:
    """Whether the same definition was executed again, as in a notebook."""
    makes = [thing if isinstance(thing, type) else type(thing) for thing in (old, new)]
    return len({(made.__module__, made.__qualname__) for made in makes}) == 1


class Method(Protocol):
    """Interface of a method that is made by its name: for ``fallback``, `from_config` and `compare`."""

    Config: ClassVar[Any]

    def __init__(self, model: nn.Module, config: Any = None) -> None:
        """A maker for a model."""

    @classmethod
    def refuse(cls, model: nn.Module) -> str | None:
        """Why this method cannot serve a model; None if it can."""


class Methods(Registry[type[Method]]):
    """Maker classes by name: those of the library, each imported when it is looked up, then those of users."""

    def __init__(self, home: str) -> None:
        """An empty registry.

        Args:
            home: package of the library's methods; importing it says, by `expect`, in which modules they register.
        """
        super().__init__("method", object, named=True)
        self.home = home
        self.modules: dict[str, str] | None = None

    def expect(self, modules: Mapping[str, str]) -> None:
        """Declare names, in order, and the modules that register them when they are imported."""
        self.modules = dict(modules)

    @property
    def expected(self) -> Mapping[str, str]:
        """Names and modules that `expect` was given."""
        if self.modules is None:
            import_module(self.home)
        return self.modules or {}

    def __getitem__(self, name: str) -> type[Method]:
        if name not in self.entries and name in self.expected:
            import_module(self.expected[name])
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self.expected, *self.entries)))

    def __contains__(self, name: object) -> bool:
        return name in self.entries or name in self.expected

    def takes(self, given: object) -> bool:
        return isinstance(given, type) and callable(getattr(given, "refuse", None)) and hasattr(given, "Config")

    def add(self, name: str | None, given: Any) -> None:
        ours = given.__module__.partition(".")[0] == __name__.partition(".")[0]
        if not ours and name in self.expected:
            raise ValueError(f"register: the method {name!r} is one of the library's: give yours a name of its own")
        super().add(name, given)

    def unfit(self, given: Any) -> str | None:
        config: Any = given.Config
        if not is_dataclass(config):
            return f"has a Config that is no dataclass: {config!r}"
        missing = sorted(getattr(config, "__abstractmethods__", ()))
        return f"has an abstract Config, {config!r}: it lacks {', '.join(missing)}" if missing else None


METHODS = Methods("gradmaker.methods")
"""Method by name, as in ``{method: kfac}``."""


@overload
def register(name: str) -> Callable[[T], T]: ...
@overload
def register(name: str, given: T) -> T: ...
@overload
def register(name: type[T]) -> type[T]: ...
def register(name: Any, given: Any = None) -> Any:
    """Register a method or a part of your own by name: it is then legal wherever the library's own are.

    That is in `from_config` and YAML files, as a ``fallback``, in the rows of `compare`, in errors that list legal names,
    and in the generated tests. A call or a decorator::

        @register("mine")
        class MineGradientMaker(Preconditioned[MineGradientConfig]):
            Config = MineGradientConfig

        @register
        @dataclass(frozen=True, kw_only=True)
        class MySolver(Solver[Factored]): ...

        register("half", Half())

    Args:
        name: of a method or a grafting rule. Curvatures, representations, solvers and layer rules have that of their class.
        given: a maker class, a class of parts, a layer rule, or an instance of a grafting rule.

    Returns:
        What was given, or, with a name alone, a decorator.

    Raises:
        ValueError: for a name that is taken, or an object that its name could not make.
        TypeError: for an object of no registered kind.
    """
    if isinstance(name, str) and given is None:

        def registered(made: T) -> T:
            _add(name, made)
            return made

        return registered
    chosen, made = (name, given) if isinstance(name, str) else (None, name)
    _add(chosen, made)
    return made


def _add(name: str | None, given: Any) -> None:
    registry = next((r for r in Registry.known if r.takes(given)), None)
    if registry is None:
        legal = ", ".join(f"a {r.kind}" for r in Registry.known)
        raise TypeError(f"register: {given!r} is none of these: {legal}")
    registry.add(name, given)


@contextmanager
def temporary_registrations() -> Iterator[None]:
    """Context whose registrations are undone at its end: for tests."""
    before = [(registry, dict(registry.entries)) for registry in Registry.known]
    try:
        yield
    finally:
        for registry, entries in before:
            own = {name: entry for name, entry in registry.entries.items() if _of_the_library(entry)}
            registry.entries = entries | {name: entry for name, entry in own.items() if name not in entries}


def _of_the_library(entry: object) -> bool:
    module = entry.__module__ if isinstance(entry, type) else type(entry).__module__
    return module.partition(".")[0] == __name__.partition(".")[0]
