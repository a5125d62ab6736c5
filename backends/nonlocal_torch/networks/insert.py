"""Non-local blocks put into networks, and taken out again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, Unpack

from torch import nn

from nonlocal_core.errors import fail_value
from nonlocal_core.networks.insertion import CHILD, Insertion, check_flow, fail_taken, resolve_places
from nonlocal_core.networks.recipes import Positions
from nonlocal_core.spec import NonLocalSpec
from nonlocal_core.spec.options import SpecOptions, check_options
from nonlocal_torch.block import NonLocalBlock
from nonlocal_torch.networks.look import check_module, run_once
from nonlocal_torch.networks.outputs import check_channels, pick, replaced, smaller_flows

__all__ = ["insert_nonlocal", "remove_nonlocal"]

_HOOK = "nonlocal_hook"
"""The attribute of a module with a block: the handle of the hook that calls it, None where no hook is needed."""


def insert_nonlocal(
    model: nn.Module,
    after: Sequence[str] | Positions,
    *,
    example_input: Any,
    method: str = "auto",
    data_format: str = "channels_first",
    output: int | str | None = None,
    **options: Unpack[SpecOptions],
) -> list[Insertion]:
    """Put new non-local blocks into a network, in place; what it computes stays the same until they are trained.

    That holds unless `zero_init=False` or `residual=False` is given.

    A block becomes the child `nonlocal_block` of the module after which it stands, so that all other names in the
    state of the network stay as they were. It has the device of what flows there, the dtype of the parameters there
    and the mode of the module. Insert before an optimiser, a compiler or a wrapper for several devices takes the
    network.

    Args:
        model: the network.
        after: the names of modules, such as "layer3.4", or the places that `nonlocal_core.recipes.positions` gives.
        example_input: what the network is run on, in evaluation, to see what flows at the places: a tensor, a
            tuple of positional arguments, or a dict of keyword arguments. What flows must have a batch axis.
        method: as in `NonLocalBlock`.
        data_format: what flows at the places: "channels_first", or "channels_last" as inside a Swin or ViT.
        output: the index or the key of what the block takes, of several tensors that the modules return in a tuple, a
            list or a mapping. None: they return one tensor.
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
    check_options(insert_nonlocal, options)
    check_module(model)
    modules = dict(model.named_modules(remove_duplicate=isinstance(after, Mapping)))
    modules.pop("")
    places = resolve_places(after, modules)
    hosts = {place: modules[place] for place in places}
    _check_free(hosts)
    flows = _flows(model, hosts, example_input)
    chosen = {place: [pick(place, one, output) for one in flow] for place, flow in flows.items()}
    seen = {place: check_flow(place, flow) for place, flow in chosen.items()}
    _check_children(model, hosts, example_input, output)
    check_channels(seen, smaller_flows(partial(_flows, model, hosts), example_input), data_format, output)
    insertions = []
    for place, x in seen.items():
        shape = (x.shape[0], *x.shape[2:], x.shape[1]) if data_format == "channels_first" else tuple(x.shape)
        spec = NonLocalSpec(channels=shape[-1], **options)
        spec.check_input(shape)
        insertions.append(Insertion(place, f"{place}.{CHILD}", shape, spec))
    blocks = []
    for insertion in insertions:
        host, x = hosts[insertion.after], seen[insertion.after]
        tensors = chain(host.parameters(), model.parameters(), [x])
        dtype = next(a.dtype for a in tensors if a.is_floating_point())
        own: dict[str, Any] = {"method": method, "data_format": data_format, "device": x.device, "dtype": dtype}
        blocks.append(NonLocalBlock.from_spec(insertion.spec, **own))
    for place, block in zip(places, blocks, strict=True):
        _put(hosts[place], block.train(hosts[place].training), output)
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


def _check_free(hosts: Mapping[str, nn.Module]) -> None:
    """Check that no module at a place has a block, or is named twice."""
    free: list[nn.Module] = []
    for place, host in hosts.items():
        if hasattr(host, CHILD) or any(host is other for other in free):
            raise fail_taken(place)
        free.append(host)


def _check_children(
    model: nn.Module, hosts: Mapping[str, nn.Module], example_input: Any, output: int | str | None
) -> None:
    """Check that what is put into the module at each place is run once."""
    children = {place: nn.Identity() for place in hosts}
    try:
        for place, child in children.items():
            if output is not None and _is_plain(hosts[place]):
                rule = "name no plain Sequential where `output` is given"
                raise fail_value("after", rule, f"{place!r}; name the last module in it")
            _put(hosts[place], child, output)
        flows = _flows(model, children, example_input)
    finally:
        for host in hosts.values():
            _take(host)
    for place, flow in flows.items():
        if len(flow) != 1:
            rule = "be no module that loops over those in it, since it would run the block too"
            raise fail_value("after", rule, f"{place!r}; name the last module in it")


def _flows(model: nn.Module, modules: Mapping[str, nn.Module], example_input: Any) -> dict[str, list[Any]]:
    """Return by place what comes out of each module, each time that a run of the network passes it."""
    flows: dict[str, list[Any]] = {place: [] for place in modules}

    def keep(place: str, _module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        flows[place].append(output)

    handles = [module.register_forward_hook(partial(keep, place)) for place, module in modules.items()]
    try:
        run_once(model, example_input)
    finally:
        for handle in handles:
            handle.remove()
    return flows


def _is_plain(host: nn.Module) -> bool:
    """Return whether a module runs its members in turn and does nothing else."""
    return type(host).forward is nn.Sequential.forward


def _put(host: nn.Module, child: nn.Module, output: int | str | None) -> None:
    """Let the output of a module, or one of its outputs, pass through a child."""
    host.add_module(CHILD, child)
    through = _through_child if output is None else partial(_one_through_child, output)
    # A plain Sequential runs its members, the last one after all others; a hook would run it once more.
    hook = None if _is_plain(host) else host.register_forward_hook(through)
    # The handle goes where the module goes: read from a pickle it keeps other hooks from taking its number.
    setattr(host, _HOOK, hook)


def _take(host: nn.Module) -> None:
    """Undo `_put`, where it was done."""
    if _HOOK in vars(host):
        hook = vars(host).pop(_HOOK)
        if hook is not None:
            hook.remove()
        delattr(host, CHILD)


def _through_child(module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> Any:
    return getattr(module, CHILD)(output)


def _one_through_child(key: int | str, module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> Any:
    return replaced(output, key, getattr(module, CHILD)(output[key]))
