"""What is asked of a network that holds non-local blocks: are they the identity, and what do they attend to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from flax import nnx
from jax import Array

from nonlocal_core.errors import fail_type
from nonlocal_core.networks.attention_map import AttentionMap
from nonlocal_core.networks.insertion import call_arguments, check_calls, check_identities, resolve_block
from nonlocal_jax.block import NonLocalBlock
from nonlocal_jax.hosts import change_call, keep_value, kept_values

__all__ = ["attention_of", "check_identity", "modules_of"]


def check_identity(model: nnx.Module) -> None:
    """Check that every non-local block of a network is the identity, as new ones are.

    A network that initialises its variables again after the insertion makes its blocks anything but that.

    Args:
        model: the network.

    Raises:
        TypeError: if `model` is no module.
        ValueError: if there is no block, or one is not the identity; the error names it.

    Example:
        >>> from nonlocal_jax import NonLocalBlock
        >>> model = nnx.Sequential(nnx.relu, NonLocalBlock(8, rngs=nnx.Rngs(0)))
        >>> check_identity(model)
        >>> model.layers[1].out.bias[...] = 1.0
        >>> check_identity(model)
        Traceback (most recent call last):
        ValueError: `model` must have blocks that are the identity, with zeros in their last factor. Got other values \
in out.bias of 'layers.1', as after another initialisation.
    """
    check_identities({name: (block.export_params(), block.spec) for name, block in _blocks(model).items()})


def attention_of(model: nnx.Module, x: Any, block: str | None = None, positions: Any = None) -> AttentionMap:
    """Return the weights of a non-local block inside a network, for what enters it when the network runs.

    A copy of the network runs, in evaluation; mode, statistics and random state stay as they are.

    Args:
        model: the network.
        x: its input: an array, a tuple of positional arguments, or a dict of keyword arguments.
        block: the path of the block or of the place before it; None: the only one.
        positions: flat indices of Q queries on the grid of the block, row-major. None: all N, the whole matrix.

    Returns:
        The rows `(B, Q, M)` as NumPy arrays (bfloat16 as float32), with the grid and the spec of the block.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if there is no such block, the run does not pass it once, or a position is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from nonlocal_jax import NonLocalBlock
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Conv(3, 8, (3, 3), rngs=rngs), NonLocalBlock(8, subsample=2, rngs=rngs))
        >>> found = attention_of(model, jnp.ones((2, 9, 11, 3)), positions=[0, 98])
        >>> found.weights.shape, found.sizes, found.key_sizes
        ((2, 2, 20), (9, 11), (4, 5))
    """
    check_module(model)
    model = nnx.clone(model)
    model.eval()
    blocks = _blocks(model)
    name = resolve_block(block, blocks)
    chosen = blocks[name]
    change_call(chosen, _keep_arguments)
    args, kwargs = call_arguments(x)
    model(*args, **kwargs)
    entered = kept_values(chosen)
    check_calls("block", name, len(entered))
    ((x, key_mask),) = entered
    weights = np.asarray(chosen.attention(x, positions, key_mask))
    return AttentionMap(weights, positions, x.shape[1:-1], chosen.spec)


def check_module(model: nnx.Module) -> None:
    """Check that a network is a module."""
    if not isinstance(model, nnx.Module):
        raise fail_type("model", "be a flax.nnx.Module", model)


def modules_of(model: nnx.Module) -> dict[str, nnx.Module]:
    """Return every module in a network by its path, such as "layer3.4"; the network itself has an empty one."""
    check_module(model)
    return {".".join(map(str, path)): module for path, module in nnx.iter_modules(model)}


def _blocks(model: nnx.Module) -> dict[str, NonLocalBlock]:
    """Return every non-local block in a network by its path."""
    return {name: module for name, module in modules_of(model).items() if isinstance(module, NonLocalBlock)}


def _keep_arguments(block: nnx.Module, own_call: Callable[..., Any], x: Array, key_mask: Array | None = None) -> Array:
    keep_value(block, (x, key_mask))
    return own_call(x, key_mask)
