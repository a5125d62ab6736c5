"""Modules that do more when they are called than their class says.

Flax has no hooks, and a wrapper would change the paths of all that it wraps. So a module stays where it is and its
class becomes a subclass of the same name, whose call is another.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flax import nnx

if TYPE_CHECKING:
    from flax.nnx.module import ModuleMeta
else:
    ModuleMeta = type(nnx.Module)  # wherever this version of Flax has it

__all__ = ["change_call", "is_changed", "keep_value", "kept_values", "restore_call"]

_KEPT = "nonlocal_kept"


class _Changed(ModuleMeta):
    """The type of the classes that are made here."""

    _made_of: tuple[type[nnx.Module], Callable[..., Any]]


@functools.cache
def _changed(kind: type[nnx.Module], call: Callable[..., Any]) -> _Changed:
    """Return the subclass, always the same one: equal models have equal graphs then, and are traced once.

    Pickles of networks with blocks name this function.
    """

    @functools.wraps(kind.__call__, updated=())
    def called(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        return call(self, functools.partial(kind.__call__, self), *args, **kwargs)

    body = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    body |= {"__call__": called, "_made_of": (kind, call)}
    return _Changed(kind.__name__, (kind,), body, pytree=kind._pytree__is_pytree)  # noqa: SLF001 - not inherited


# By its name a pickle would find the class that was changed.
copyreg.pickle(_Changed, lambda changed: (_changed, changed._made_of))  # noqa: SLF001 - set above


def change_call(module: nnx.Module, call: Callable[..., Any]) -> None:
    """Let a module compute `call(module, own_call, *args, **kwargs)`; `call` must be found by its name."""
    object.__setattr__(module, "__class__", _changed(type(module), call))


def is_changed(module: nnx.Module) -> bool:
    """Return whether `change_call` has changed a module."""
    return isinstance(type(module), _Changed)


def restore_call(module: nnx.Module) -> None:
    """Give a module its own class back."""
    object.__setattr__(module, "__class__", type(module).__base__)


def keep_value(module: nnx.Module, value: Any) -> None:
    """Keep a value in a module: as a variable, which leaves a transformation when that ends."""
    if not hasattr(module, _KEPT):
        setattr(module, _KEPT, nnx.Intermediate(()))
    variable = getattr(module, _KEPT)
    variable.set_value((*variable.get_value(), value))


def kept_values(module: nnx.Module) -> tuple[Any, ...]:
    """Return the values that were kept."""
    return getattr(module, _KEPT).get_value() if hasattr(module, _KEPT) else ()
