"""The options of a spec: what each may be, and the one form to which it is brought."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypedDict

from nonlocal_core.arguments import check_bool, check_choice, check_finite, check_int
from nonlocal_core.errors import fail_type, fail_value
from nonlocal_core.geometry import SPACES, VIDEO

__all__ = ["PAIRWISE", "Bias", "SpecOptions", "is_softmax"]

LAYERS = {
    "gaussian": ("g", "out"),
    "embedded_gaussian": ("theta", "phi", "g", "out"),
    "dot_product": ("theta", "phi", "g", "out"),
    "concatenation": ("theta", "phi", "g", "concat", "out"),
}
"""The layers of each form, in the order of the computation; a function has those of the embedded forms."""

PAIRWISE = tuple(LAYERS)
"""The named forms."""

_SOFTMAX = {"gaussian": True, "embedded_gaussian": True, "dot_product": False, "concatenation": False}


class Bias(Mapping[str, bool]):
    """An immutable, hashable mapping from the name of a layer to whether it has a bias."""

    def __init__(self, items: Mapping[str, bool]) -> None:
        """Keep a copy of `items`."""
        self._items = dict(items)

    def __getitem__(self, layer: str) -> bool:
        """Return whether `layer` has a bias."""
        return self._items[layer]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the layers, in the order of the computation."""
        return iter(self._items)

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self._items)

    def __hash__(self) -> int:
        """Return a hash of the items."""
        return hash(tuple(self._items.items()))

    def __repr__(self) -> str:
        """Show it as the dict that makes it."""
        return repr(self._items)


class SpecOptions(TypedDict, total=False):
    """The options of `NonLocalSpec` beside `channels`, for the signatures of the adapters."""

    inner_channels: int | None
    pairwise: str | Callable[[Any, Any], Any]
    normalize: Literal["softmax", "count"] | None
    scale: float | Literal["inner", "input"] | None
    subsample: int | Sequence[int] | None
    subsample_at: Literal["projection", "input"]
    axes: Literal["all", "space", "time"] | Sequence[int]
    group_size: int | None
    bias: bool | Mapping[str, bool]
    norm: Literal["batch", "affine"] | None
    norm_epsilon: float
    norm_momentum: float
    residual: bool
    zero_init: bool


def check_options(
    owner: Callable[..., Any], options: Iterable[str], known: Iterable[str] = SpecOptions.__annotations__
) -> None:
    """Check that `owner`, a class or a function, takes these options: its own, and those that are known.

    Raises:
        TypeError: if one is unknown.
    """
    for name in options:
        if name in known:
            continue
        called = owner.__init__ if isinstance(owner, type) else owner  # type: ignore[misc]
        parameters = inspect.signature(called).parameters.values()
        own = [one.name for one in parameters if one.kind is not one.VAR_KEYWORD]
        if name not in own:
            near = difflib.get_close_matches(name, [*own, *known], n=1)
            hint = f"; the nearest is `{near[0]}`" if near else ""
            message = f"`{name}` must be an option of {owner.__qualname__}. Got an unknown one{hint}."
            raise TypeError(message)


def layers_of(pairwise: Any) -> tuple[str, ...]:
    """Return the layers of a form, in the order of the computation; anything but a name counts as a function."""
    return LAYERS.get(pairwise if isinstance(pairwise, str) else "", LAYERS["embedded_gaussian"])


def default_inner(channels: int) -> int:
    """Return the inner channels of the paper: half of the channels."""
    return max(channels // 2, 1)


def is_softmax(pairwise: str | Callable[[Any, Any], Any], normalize: str | None) -> bool:
    """Return whether weights are a softmax over the keys (False: scores divided by their number)."""
    return _SOFTMAX[pairwise] if isinstance(pairwise, str) else normalize == "softmax"


def check_pairwise(pairwise: Any, normalize: Any) -> tuple[str | Callable[[Any, Any], Any], str | None]:
    """Check the form and, for a function, how its scores become weights; return both."""
    if normalize is not None and not isinstance(normalize, str):
        raise fail_type("normalize", "be None, 'softmax' or 'count'", normalize)
    if isinstance(pairwise, str):
        form = check_choice("pairwise", pairwise, PAIRWISE)
        if normalize is not None:
            rule = f"be None for the named form {form!r}, which fixes it"
            raise fail_value("normalize", rule, repr(normalize))
        return form, None
    if not callable(pairwise):
        raise fail_type("pairwise", "be a string or a function", pairwise)
    if normalize not in {"softmax", "count"}:
        raise fail_value("normalize", "be 'softmax' or 'count' for a `pairwise` function", repr(normalize))
    return pairwise, "softmax" if normalize == "softmax" else "count"


def normal_scale(scale: Any, named: tuple[str, ...] = ("inner", "input")) -> float | str | None:
    """Return a scale in its one form: None, one of the names, or a finite, non-zero Python float."""
    rule = f"be {', '.join(['None', *map(repr, named)])} or a finite, non-zero float"
    if scale is None:
        return None
    if isinstance(scale, str):
        if scale not in named:
            raise fail_value("scale", rule, repr(scale))
        return named[named.index(scale)]
    number = check_finite("scale", scale, rule)
    if number == 0:
        raise fail_value("scale", rule, number)
    return number


def normal_subsample(subsample: Any) -> int | tuple[int, ...] | None:
    """Return a pooling window in its one form: None, a Python int, or a tuple of them."""
    rule = "be a positive int or one per axis"
    if subsample is None:
        return None
    if not isinstance(subsample, Sequence) or isinstance(subsample, str | bytes | bytearray):
        return check_int("subsample", subsample, rule)
    if not 1 <= len(subsample) <= VIDEO:
        raise fail_value("subsample", rule, tuple(subsample))
    try:
        return tuple(check_int("subsample", size, rule) for size in subsample)
    except ValueError:
        raise fail_value("subsample", rule, tuple(subsample)) from None


def normal_axes(axes: Any) -> str | tuple[int, ...]:
    """Return axes in their one form: a name, or an ascending tuple."""
    rule = "be 'all', 'space', 'time' or a tuple of distinct spatial axes from 0, 1, 2"
    if isinstance(axes, str):
        if axes not in SPACES:
            raise fail_value("axes", rule, repr(axes))
        return next(name for name in SPACES if name == axes)
    if not isinstance(axes, Sequence) or isinstance(axes, bytes | bytearray):
        raise fail_type("axes", rule, axes)
    chosen = tuple(check_int("axes", axis, rule, least=0) for axis in axes)
    if not chosen or len(set(chosen)) < len(chosen) or max(chosen) >= VIDEO:
        raise fail_value("axes", rule, chosen)
    return tuple(sorted(chosen))


def normal_bias(bias: Any, layers: tuple[str, ...]) -> Bias:
    """Return biases in their one form: a mapping from each of `layers` to a bool."""
    if not isinstance(bias, Mapping):
        every = check_bool("bias", bias) if not isinstance(bias, str) else None
        if every is None:
            raise fail_type("bias", "be a bool or a mapping from a layer to a bool", bias)
        return Bias({layer: every and layer != "concat" for layer in layers})
    absent = [layer for layer in bias if layer not in layers]
    if absent:
        raise fail_value("bias", f"name layers of this form, {layers}", absent)
    return Bias({layer: check_bool("bias", bias.get(layer, layer != "concat")) for layer in layers})
