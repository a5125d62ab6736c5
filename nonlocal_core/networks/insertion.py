"""What the insertion of blocks into networks shares: places by name, what is reported, and the test of identity."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from nonlocal_core.arguments import Size, dtype_name
from nonlocal_core.costs.model import cost
from nonlocal_core.errors import fail_type, fail_value
from nonlocal_core.networks.recipes import Positions, places
from nonlocal_core.spec import NonLocalSpec
from nonlocal_core.spec.parameters import STATISTICS, param_shapes

__all__ = [
    "CHILD",
    "Insertion",
    "call_arguments",
    "check_calls",
    "check_flow",
    "check_identities",
    "fail_place",
    "fail_taken",
    "resolve_block",
    "resolve_places",
]

CHILD = "nonlocal_block"
"""What an inserted block is called within the module after which it stands."""


@dataclasses.dataclass(frozen=True)
class Insertion:
    """One block that was put into a network.

    Args:
        after: the name of the layer or module whose output it takes.
        name: its own name.
        shape: what flows there, `(B, S1..Sk, C)` whatever the layout; None where a size is unknown.
        spec: what it computes.
    """

    after: str
    name: str
    shape: tuple[Size, ...]
    spec: NonLocalSpec

    @property
    def parameters(self) -> int:
        """The number of trained parameters that it adds."""
        shapes = param_shapes(self.spec).items()
        return sum(math.prod(shape) for name, shape in shapes if name not in STATISTICS)

    @property
    def flops(self) -> int | None:
        """The floating-point operations of a forward pass at `shape` (`nonlocal_core.cost`), None if a size is unknown.

        They are those of the method that needs the fewest.
        """
        sizes = [size for size in self.shape if size is not None]
        if len(sizes) < len(self.shape):
            return None
        return min(method.flops for method in cost(self.spec, sizes).methods.values())

    def __str__(self) -> str:
        """Show the insertion in one line."""
        sizes = " x ".join("?" if size is None else str(size) for size in self.shape[1:-1])
        flops = "" if self.flops is None else f", {self.flops / 1e9:.3g} GFLOPs"
        return (
            f"{self.name} after {self.after}: {self.spec.pairwise}, {self.spec.channels} channels on {sizes}, "
            f"{self.parameters:,} parameters{flops}"
        )


def resolve_places(after: Sequence[str] | Positions, names: Collection[str]) -> list[str]:
    """Return the names of the places after which blocks are to be put.

    Args:
        after: names, or what `nonlocal_core.recipes.positions` gives, for a common ResNet.
        names: all names in the network.

    Raises:
        TypeError: if `after` is neither.
        ValueError: if there is no place, a place is not in the network, or one is named twice.
    """
    if isinstance(after, Mapping):
        after = places(names, after)
    elif isinstance(after, str) or not isinstance(after, Sequence) or not all(isinstance(one, str) for one in after):
        raise fail_type("after", "be a list of names, or positions by stage", after)
    if not after:
        raise fail_value("after", "name at least one place", repr(after))
    for index, name in enumerate(after):
        if name not in names:
            raise fail_place(name, "be in the network", names)
        if name in after[:index]:
            raise fail_value("after", "name each place once", repr(name))
    return list(after)


def fail_place(name: object, rule: str, names: Collection[str]) -> ValueError:
    """Return the error for a place that cannot serve; it lists names near to it."""
    near = difflib.get_close_matches(str(name), names, n=5, cutoff=0.3)
    return fail_value("after", rule, f"{name!r}; near names: {', '.join(map(repr, near)) or 'none'}")


def fail_taken(place: str) -> ValueError:
    """Return the error for a place after which a block stands already."""
    return fail_value("after", "have no block yet", f"{place!r}, which has one")


def call_arguments(given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and the keyword arguments that an array, a tuple or a dict stands for."""
    if isinstance(given, Mapping):
        return (), dict(given)
    return (given if isinstance(given, tuple) else (given,)), {}


def check_calls(argument: str, name: str, calls: int) -> None:
    """Check that a run of the network passes a place or a block once, so that it is clear what is meant.

    Raises:
        ValueError: if it passes it never or several times.
    """
    if calls != 1:
        raise fail_value(argument, "be passed once in a run of the network", f"{name!r}, passed {calls} times")


def check_flow(place: str, flows: Sequence[Any]) -> Any:
    """Return what comes out at a place, when it is one array that a block can take.

    Args:
        place: the name of the place.
        flows: what came out there in one run of the network, once for each time that the place was passed.

    Raises:
        ValueError: if the place was not passed exactly once, or no floating-point array of 3 to 5 axes came out.
    """
    check_calls("after", place, len(flows))
    (flow,) = flows
    got = type(flow).__name__
    if hasattr(flow, "dtype") and hasattr(flow, "shape"):
        got = f"{dtype_name(flow)} of shape {tuple(flow.shape)}"
        if got.startswith(("float", "bfloat")) and 3 <= len(flow.shape) <= 5:  # noqa: PLR2004 - 1 to 3 spatial axes
            return flow
    rule = "give one floating-point array of 3 to 5 axes"
    raise fail_value("after", rule, f"{place!r}, which gives {got}")


def resolve_block(block: str | None, names: Collection[str], joint: str = ".") -> str:
    """Return which block of a network is meant.

    Args:
        block: the name of the block or of the place before it; None: the only one.
        names: the names of all blocks in the network.
        joint: what stands between the name of a place and that of its block.

    Raises:
        ValueError: if there is no such block, or None does not tell which.
    """
    if block is None and len(names) == 1:
        return next(iter(names))
    for name in (block, f"{block}{joint}{CHILD}"):
        if name is not None and name in names:
            return name
    rule = "be the name of a non-local block or of the place before it"
    raise fail_value("block", rule, f"{block!r}; blocks: {', '.join(map(repr, names)) or 'none'}")


def check_identities(blocks: Mapping[str, tuple[Mapping[str, Any], NonLocalSpec]]) -> None:
    """Check that blocks add nothing to their input, as new ones do.

    Args:
        blocks: from the name of each block in a network to its canonical parameters and its spec.

    Raises:
        ValueError: if there is no block, or one is not the identity.
    """
    if not blocks:
        raise fail_value("model", "have at least one non-local block", "none")
    faults = []
    for block, (params, spec) in blocks.items():
        last = "out" if spec.norm is None else "norm"
        found = [name for name in (f"{last}.weight", f"{last}.bias") if name in params and np.any(params[name])]
        faults += [f"{name} of {block!r}" for name in (found if spec.residual else ["no residual connection"])]
    if faults:
        rule = "have blocks that are the identity, with zeros in their last factor"
        raise fail_value("model", rule, f"other values in {', '.join(faults)}, as after another initialisation")
