"""What flows at the places of a network: one of several outputs, and which of its axes holds the channels."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nonlocal_core.arguments import check_choice
from nonlocal_core.errors import fail_value
from nonlocal_torch.block import FORMATS

__all__ = ["check_channels", "pick", "replaced", "smaller_flows"]

Flows = dict[str, list[Any]]


def pick(place: str, output: Any, key: int | str | None) -> Any:
    """Return one output of a module.

    Raises:
        ValueError: if it has no such output.
    """
    if key is None:
        return output
    try:
        if not isinstance(output, Tensor):
            return output[key]
    except (LookupError, TypeError):
        pass
    has = f"the keys {list(output)}" if isinstance(output, Mapping) else f"a {type(output).__name__}"
    length = f" of {len(output)}" if isinstance(output, Sequence) else ""
    rule = "be an index or a key of what the modules return"
    raise fail_value("output", rule, f"{key!r}, where {place!r} returns {has}{length}")


def replaced(output: Any, key: int | str, value: Tensor) -> Any:
    """Return outputs of their own type, one of which is another."""
    changed: Any = list(output) if isinstance(output, tuple) else copy.copy(output)  # what the module keeps of it stays
    changed[key] = value
    if not isinstance(output, tuple):
        return changed
    return type(output)(*changed) if hasattr(output, "_fields") else tuple(changed)


def smaller_flows(run: Callable[[Any], Flows], inputs: Any) -> Flows:
    """Return what flows in a run on half of each axis of positions; nothing where the network takes no other size."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return run(_halved(inputs))
    except Exception:  # noqa: BLE001 - the network's own; it has run on the inputs themselves
        return {}


def check_channels(seen: Mapping[str, Tensor], smaller: Flows, data_format: str, output: int | str | None) -> None:
    """Check that the axis of the channels has its size whatever the size of the input.

    Raises:
        ValueError: if it has not: what flows there has another data format.
    """
    axis = 1 if check_choice("data_format", data_format, FORMATS) == FORMATS[0] else -1
    for place, x in seen.items():
        for flow in smaller.get(place, []):
            size = pick(place, flow, output).shape[axis]
            if size != x.shape[axis]:
                rule = "name the axis of the channels, whose size no input changes"
                got = f"{data_format!r}, where it has size {x.shape[axis]} after {place!r}, and {size} in a smaller run"
                raise fail_value("data_format", rule, got)


def _halved(inputs: Any) -> Any:
    """Return tensors cut to half of each axis after the first two."""
    if isinstance(inputs, Mapping):
        return {name: _halved(one) for name, one in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(map(_halved, inputs))
    if not isinstance(inputs, Tensor) or not torch.is_floating_point(inputs):
        return inputs
    return inputs[(slice(None), slice(None), *(slice((size + 1) // 2) for size in inputs.shape[2:]))]
