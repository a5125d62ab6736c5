"""Non-local blocks put into networks, and taken out again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from flax import nnx

from nonlocal_core.checks import known_sizes
from nonlocal_core.errors import fail_value
from nonlocal_core.insertion import CHILD, Insertion, check_flow, fail_taken, resolve_places
from nonlocal_core.options import SpecOptions
from nonlocal_core.recipes import Positions
from nonlocal_jax.block import NonLocalBlock
from nonlocal_jax.hosts import become, has_become, note, notes, restore
from nonlocal_jax.network import arguments, modules_of

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
    **options: Unpack[SpecOptions],
) -> list[Insertion]:
    """Put new non-local blocks into a network, in place; what it computes stays the same until they are trained.

    A block becomes the child `nonlocal_block` of the module after which it stands, so that all other paths in the
    state of the network stay as they were. It is in evaluation if every module that knows a mode is. Insert before an
    optimiser takes the network, and before `nnx.split`.

    Args:
        model: the network.
        after: the paths of modules, such as "layer3.4", or the places that `nonlocal_core.recipes.positions` gives.
        rngs: the source of the random weights, its stream `params`.
        example_input: what the network is traced with, in evaluation, to see what flows at the places: an array, a
            tuple of positional arguments, or a dict of keyword arguments; `jax.ShapeDtypeStruct` stands for an array.
        method: as in `NonLocalBlock`.
        dtype: the dtype of the computation. None: that of what flows there.
        param_dtype: the dtype of the parameters.
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
    modules = modules_of(model)
    places = resolve_places(after, [name for name in modules if name])
    for place in places:
        if hasattr(modules[place], CHILD):
            raise fail_taken(place)
    insertions, blocks = [], []
    for place, flows in _seen(model, places, example_input).items():
        shape = known_sizes(check_flow(place, flows).shape)
        block = NonLocalBlock(shape[-1], rngs=rngs, method=method, dtype=dtype, param_dtype=param_dtype, **options)
        block.spec.check_input(shape)
        block.use_running_average = _in_evaluation(model)
        insertions.append(Insertion(place, f"{place}.{CHILD}", shape, block.spec))
        blocks.append(block)
    for place, block in zip(places, blocks, strict=True):
        setattr(modules[place], CHILD, block)
        become(modules[place], _through_child)
    return insertions


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
    hosts = [module for module in modules_of(model).values() if has_become(module)]
    if not hosts:
        raise fail_value("model", "have at least one inserted non-local block", "none")
    for host in hosts:
        delattr(host, CHILD)
        restore(host)


def _seen(model: nnx.Module, places: list[str], example_input: Any) -> dict[str, tuple[Any, ...]]:
    """Return for each place the shape and dtype of what flows there, once for each time that it is passed."""
    leaves, structure = jax.tree.flatten(arguments(example_input))
    arrays = {i: leaf for i, leaf in enumerate(leaves) if hasattr(leaf, "dtype")}  # the others stay what they are
    graph, state = nnx.split(model)

    def run(state: Any, arrays: dict[int, Any]) -> list[tuple[Any, ...]]:
        copy = nnx.merge(graph, state)
        copy.eval()
        hosts = [modules_of(copy)[place] for place in places]
        for host in filter(callable, hosts):
            become(host, _note_result)
        args, kwargs = jax.tree.unflatten(structure, [arrays.get(i, leaf) for i, leaf in enumerate(leaves)])
        copy(*args, **kwargs)
        return [notes(host) for host in hosts]

    return dict(zip(places, jax.eval_shape(run, state, arrays), strict=True))


def _in_evaluation(model: nnx.Module) -> bool:
    """Return whether every module that knows a mode is in evaluation."""
    names = ("deterministic", "use_running_average")
    modes = [getattr(module, name, None) for module in modules_of(model).values() for name in names]
    modes = [mode for mode in modes if mode is not None]
    return bool(modes) and all(modes)


def _through_child(host: nnx.Module, own_call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return getattr(host, CHILD)(own_call(*args, **kwargs))


def _note_result(host: nnx.Module, own_call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    result = own_call(*args, **kwargs)
    note(host, result)
    return result
