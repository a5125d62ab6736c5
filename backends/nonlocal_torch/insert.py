"""Non-local blocks put into networks, and taken out again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Unpack

from torch import Tensor, nn

from nonlocal_core.errors import fail_value
from nonlocal_core.insertion import CHILD, Insertion, check_flow, fail_taken, resolve_places
from nonlocal_core.options import SpecOptions
from nonlocal_core.recipes import Positions
from nonlocal_core.spec import NonLocalSpec
from nonlocal_torch.block import NonLocalBlock
from nonlocal_torch.network import check_module, run_once

__all__ = ["insert_nonlocal", "remove_nonlocal"]

_HOOK = "nonlocal_hook"
"""The attribute of a module with a block: the handle of the hook that calls it, None where no hook is needed."""


def insert_nonlocal(
    model: nn.Module,
    after: Sequence[str] | Positions,
    *,
    example_input: Any,
    method: str = "auto",
    **options: Unpack[SpecOptions],
) -> list[Insertion]:
    """Put new non-local blocks into a network, in place; what it computes stays the same until they are trained.

    A block becomes the child `nonlocal_block` of the module after which it stands, so that all other names in the
    state of the network stay as they were. It has the device of what flows there, the dtype of the parameters there
    and the mode of the module. Insert before an optimiser, a compiler or a wrapper for several devices takes the
    network.

    Args:
        model: the network.
        after: the names of modules, such as "layer3.4", or the places that `nonlocal_core.recipes.positions` gives.
        example_input: what the network is run on once, in evaluation, to see what flows at the places: a tensor, a
            tuple of positional arguments, or a dict of keyword arguments.
        method: as in `NonLocalBlock`.
        **options: the options of `nonlocal_core.NonLocalSpec` but `channels`, which is seen.

    Returns:
        What was inserted, in the order of `after`.

    Raises:
        TypeError: if an argument or an option has a wrong type.
        ValueError: if a place cannot take a block, or an option has a wrong value; the network is then as before.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 4, 1))
        >>> x = torch.randn(2, 3, 17, 13)
        >>> expected = model(x)
        >>> for insertion in insert_nonlocal(model, ["1"], example_input=x, norm="batch"):
        ...     print(insertion)
        1.nonlocal_block after 1: embedded_gaussian, 16 channels on 8 x 6, 584 parameters, 0.000246 GFLOPs
        >>> torch.equal(model(x), expected)
        True
    """
    check_module(model)
    modules = dict(model.named_modules(remove_duplicate=isinstance(after, Mapping)))
    modules.pop("")
    places = resolve_places(after, modules)
    seen = _seen(model, {place: modules[place] for place in places}, example_input)
    insertions = []
    for place, x in seen.items():
        shape = (x.shape[0], *x.shape[2:], x.shape[1])
        spec = NonLocalSpec(channels=x.shape[1], **options)
        spec.check_input(shape)
        insertions.append(Insertion(place, f"{place}.{CHILD}", shape, spec))
    blocks = []
    for insertion in insertions:
        host, x = modules[insertion.after], seen[insertion.after]
        tensors = chain(host.parameters(), model.parameters(), [x])
        dtype = next(a.dtype for a in tensors if a.is_floating_point())
        blocks.append(NonLocalBlock.from_spec(insertion.spec, method=method, device=x.device, dtype=dtype))
    for place, block in zip(places, blocks, strict=True):
        _put(modules[place], block.train(modules[place].training))
    return insertions


def remove_nonlocal(model: nn.Module) -> None:
    """Take all blocks that `insert_nonlocal` put into a network out again, in place.

    Args:
        model: the network.

    Raises:
        TypeError: if `model` is no module.
        ValueError: if no block was inserted.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU())
        >>> _ = insert_nonlocal(model, ["0"], example_input=torch.randn(2, 3, 7, 5))
        >>> remove_nonlocal(model)
        >>> list(model.state_dict())
        ['0.weight', '0.bias']
    """
    check_module(model)
    hosts = [module for module in model.modules() if _HOOK in vars(module)]
    if not hosts:
        raise fail_value("model", "have at least one inserted non-local block", "none")
    for host in hosts:
        _take(host)


class _Probe(nn.Module):
    """What stands in a place during the trial run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def forward(self, x: Any) -> Any:
        self.seen.append(x)
        return x


def _seen(model: nn.Module, hosts: Mapping[str, nn.Module], example_input: Any) -> dict[str, Tensor]:
    """Return what flows at each place; afterwards the network is as before."""
    probes: dict[str, _Probe] = {}
    try:
        for place, host in hosts.items():
            if hasattr(host, CHILD):
                raise fail_taken(place)
            probes[place] = _Probe()
            _put(host, probes[place])
        run_once(model, example_input)
    finally:
        for place in probes:
            _take(hosts[place])
    return {place: check_flow(place, probe.seen) for place, probe in probes.items()}


def _put(host: nn.Module, child: nn.Module) -> None:
    """Let the output of a module pass through a child."""
    host.add_module(CHILD, child)
    # A plain Sequential runs its members, the last one after all others; a hook would run it once more.
    hook = None if type(host).forward is nn.Sequential.forward else host.register_forward_hook(_through_child)
    # The handle goes where the module goes: read from a pickle it keeps other hooks from taking its number.
    setattr(host, _HOOK, hook)


def _take(host: nn.Module) -> None:
    hook = vars(host).pop(_HOOK)
    if hook is not None:
        hook.remove()
    delattr(host, CHILD)


def _through_child(module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> Any:
    return getattr(module, CHILD)(output)
