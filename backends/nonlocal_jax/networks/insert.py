"""Non-local blocks put into networks, and taken out again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from flax import nnx

from nonlocal_core.arguments import known_sizes
from nonlocal_core.errors import fail_type, fail_value
from nonlocal_core.networks.insertion import CHILD, Insertion, call_arguments, check_flow, fail_taken, resolve_places
from nonlocal_core.networks.recipes import Positions
from nonlocal_core.spec import NonLocalSpec
from nonlocal_core.spec.options import SpecOptions, check_options
from nonlocal_jax.block import NonLocalBlock
from nonlocal_jax.hosts import change_call, is_changed, keep_value, kept_values, restore_call
from nonlocal_jax.networks.look import modules_of
from nonlocal_jax.norm import AxisName

__all__ = ["insert_nonlocal", "remove_nonlocal"]


def insert_nonlocal(
    model: nnx.Module,
    after: Sequence[str] | Positions,
    *,
    rngs: nnx.Rngs,
    example_input: Any,
    method: str = "auto",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    axis_name: AxisName = None,
    norm_axis_name: AxisName = None,
    sharded_axis: int | None = None,
    **options: Unpack[SpecOptions],
) -> list[Insertion]:
    """Put new non-local blocks into a network, in place; what it computes stays the same until they are trained.

    That holds unless `zero_init=False` or `residual=False` is given.

    A block becomes the child `nonlocal_block` of the module after which it stands, so that all other paths in the
    state of the network stay as they were. It is in evaluation if every module that knows a mode is, and in training
    where none does. Insert before an optimiser takes the network, and before `nnx.split`.

    Args:
        model: the network.
        after: the paths of modules, such as "layer3.4", or the places that `nonlocal_core.recipes.positions` gives.
        rngs: the source of the random weights, its stream `params`.
        example_input: what the network is traced with, in evaluation, to see what flows at the places: an array, a
            tuple of positional arguments, or a dict of keyword arguments; `jax.ShapeDtypeStruct` stands for an array.
            What flows must have a batch axis.
        method: as in `NonLocalBlock`.
        dtype: the dtype of the computation. None: that of what flows there.
        param_dtype: the dtype of the parameters.
        axis_name: the mapped axes whose batches batch normalisation takes for one, or that cut the positions, as in
            `NonLocalBlock`, and so are the following.
        norm_axis_name: the mapped axes over which batch normalisation takes its statistics. None: `axis_name`.
        sharded_axis: the spatial axis along which `axis_name` cuts the positions, or None. `example_input` is a whole.
        **options: the options of `nonlocal_core.NonLocalSpec` but `channels`, which is seen.

    Returns:
        What was inserted, in the order of `after`.

    Raises:
        TypeError: if an argument or an option has a wrong type.
        ValueError: if a place cannot take a block, or an option has a wrong value; the network is then as before.

    Example:
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Conv(3, 16, (3, 3), strides=2, rngs=rngs), nnx.Conv(16, 4, (1, 1), rngs=rngs))
        >>> x = rngs.normal((2, 17, 13, 3))
        >>> expected = model(x)
        >>> for insertion in insert_nonlocal(model, ["layers.0"], rngs=rngs, example_input=x, norm="batch"):
        ...     print(insertion)
        layers.0.nonlocal_block after layers.0: embedded_gaussian, 16 channels on 9 x 7, 584 parameters, 0.000383 GFLOPs
        >>> bool((model(x) == expected).all())
        True
    """
    check_options(insert_nonlocal, options)
    named = _named(model)
    if not isinstance(rngs, nnx.Rngs):
        raise fail_type("rngs", "be a flax.nnx.Rngs", rngs)
    places = resolve_places(after, modules_of(model) if isinstance(after, Mapping) else named)
    hosts = {place: named[place] for place in places}
    _check_free(hosts)
    insertions = {}
    for place, flows in zip(places, _trace(model, places, example_input, _keep_at), strict=True):
        shape: tuple[Any, ...] = known_sizes(check_flow(place, flows).shape)  # the spec refuses unknown channels
        spec = NonLocalSpec(channels=shape[-1], **options)
        spec.check_input(shape)
        insertions[place] = Insertion(place, f"{place}.{CHILD}", shape, spec)
    make = partial(
        NonLocalBlock.from_spec,
        method=method,
        dtype=dtype,
        param_dtype=param_dtype,
        axis_name=axis_name,
        norm_axis_name=norm_axis_name,
        sharded_axis=sharded_axis,
    )
    nnx.eval_shape(lambda: make(insertions[places[0]].spec, rngs=nnx.Rngs(0)))  # checks what is the same for all

    def try_at(place: str, host: nnx.Module) -> None:
        block = make(insertions[place].spec, rngs=nnx.Rngs(0), sharded_axis=None)  # there is no map here
        block.use_running_average = True
        _put(host, block)

    _trace(model, places, example_input, try_at)
    evaluation = _in_evaluation(model)
    for place, insertion in insertions.items():
        block = make(insertion.spec, rngs=rngs)
        block.use_running_average = evaluation
        _put(hosts[place], block)
    return list(insertions.values())


def remove_nonlocal(model: nnx.Module) -> None:
    """Take all blocks that `insert_nonlocal` put into a network out again, in place.

    Args:
        model: the network.

    Raises:
        TypeError: if `model` is no module.
        ValueError: if no block was inserted.

    Example:
        >>> model, x = nnx.Sequential(nnx.Conv(3, 16, (3, 3), rngs=nnx.Rngs(0))), jnp.ones((2, 7, 5, 3))
        >>> _ = insert_nonlocal(model, ["layers.0"], rngs=nnx.Rngs(1), example_input=x)
        >>> remove_nonlocal(model)
        >>> [path for path, _ in nnx.to_flat_state(nnx.state(model))]
        [('layers', 0, 'bias'), ('layers', 0, 'kernel')]
    """
    hosts = [module for module in modules_of(model).values() if is_changed(module)]
    if not hosts:
        raise fail_value("model", "have at least one inserted non-local block", "none")
    for host in hosts:
        delattr(host, CHILD)
        restore_call(host)


def _named(model: nnx.Module) -> dict[str, Any]:
    """Return by path what a place may name: every module, a shared one under all its names, and functions in lists."""
    named: dict[str, Any] = {name: module for name, module in modules_of(model).items() if name}
    paths = [[".".join(map(str, path)) for path in same] for same in nnx.find_duplicates(model)]
    named |= {other: named[first] for first, *others in paths if first in named for other in others}
    members = ((path, value) for path, value in nnx.iter_graph(model) if path and isinstance(path[-1], int))
    functions = {".".join(map(str, path)): value for path, value in members if callable(value)}
    return functions | named


def _check_free(hosts: Mapping[str, Any]) -> None:
    """Check that what is at each place is a module without a block, and is named once."""
    free: list[nnx.Module] = []
    for place, host in hosts.items():
        if not isinstance(host, nnx.Module):
            raise fail_value("after", "be a flax.nnx.Module", f"{place!r}, which is a function")
        if hasattr(host, CHILD) or any(host is other for other in free):
            raise fail_taken(place)
        free.append(host)


def _trace(
    model: nnx.Module, places: list[str], example_input: Any, change: Callable[[str, nnx.Module], None]
) -> list[tuple[Any, ...]]:
    """Trace a copy of a network, changed at places, and return the shape and dtype of what is kept at each."""
    leaves, structure = jax.tree.flatten(call_arguments(example_input))
    arrays = {i: leaf for i, leaf in enumerate(leaves) if hasattr(leaf, "dtype")}  # the others stay what they are
    graph, state = nnx.split(model)

    def run(state: Any, arrays: dict[int, Any]) -> list[tuple[Any, ...]]:
        copy = nnx.merge(graph, state)
        copy.eval()
        named = _named(copy)
        for place in places:
            change(place, named[place])
        args, kwargs = jax.tree.unflatten(structure, [arrays.get(i, leaf) for i, leaf in enumerate(leaves)])
        copy(*args, **kwargs)
        return [kept_values(named[place]) for place in places]

    try:
        return jax.eval_shape(run, state, arrays)
    except Exception as error:
        if not places:
            raise
        _trace(model, [], example_input, change)  # an error that the network has by itself is raised as it is
        rule = "be modules that a block can be put into, outside of nnx.scan and nnx.vmap"
        raise fail_value("after", rule, repr(places)) from error


def _in_evaluation(model: nnx.Module) -> bool:
    """Return whether every module that knows a mode is in evaluation."""
    names = ("deterministic", "use_running_average")
    modes = [getattr(module, name, None) for module in modules_of(model).values() for name in names]
    modes = [mode for mode in modes if mode is not None]
    return bool(modes) and all(modes)


def _put(host: nnx.Module, block: NonLocalBlock) -> None:
    setattr(host, CHILD, block)
    change_call(host, _through_child)


def _through_child(host: nnx.Module, own_call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return getattr(host, CHILD)(own_call(*args, **kwargs))


def _keep_at(_place: str, host: nnx.Module) -> None:
    if callable(host):
        change_call(host, _keep_result)


def _keep_result(host: nnx.Module, own_call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    result = own_call(*args, **kwargs)
    keep_value(host, result)
    return result
