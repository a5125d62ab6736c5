"""What is asked of a network that holds non-local blocks: are they the identity, and what do they attend to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from nonlocal_core.errors import fail_type
from nonlocal_core.networks.attention_map import AttentionMap
from nonlocal_core.networks.insertion import check_calls, check_identities, resolve_block
from nonlocal_tensorflow.arrays import channels_last
from nonlocal_tensorflow.block import NonLocalBlock

__all__ = ["attention_of", "check_identity", "layers_of"]


def check_identity(model: keras.Layer) -> None:
    """Check that every non-local block of a network is the identity, as new ones are.

    A network that initialises its layers again after the insertion makes its blocks anything but that.

    Args:
        model: the network, of any kind.

    Raises:
        TypeError: if `model` is no layer.
        ValueError: if there is no block, or one is not the identity; the error names it.

    Example:
        >>> model = keras.Sequential([keras.layers.Conv1D(8, 3), NonLocalBlock(8, name="block")])
        >>> check_identity(model)
        >>> _ = model.layers[1].out.bias.assign(tf.ones(8))
        >>> check_identity(model)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: `model` must have blocks that are the identity, ... Got other values in out.bias of 'block', ...
    """
    check_identities({name: (block.last_params(), block.spec) for name, block in _blocks(model).items()})


def attention_of(
    model: keras.Layer, x: Any, block: str | None = None, positions: Sequence[int] | tf.Tensor | None = None
) -> AttentionMap:
    """Return the weights of a non-local block inside a network, for what enters it when the network runs.

    The run is eager and in evaluation; statistics and the states of random seeds stay as they are.

    Args:
        model: the network, of any kind.
        x: its input, in the structure that it takes.
        block: the name of the block or of the place before it; None: the only one. In a nested model it follows the
            model's name and a slash.
        positions: flat indices of Q queries on the grid of the block, row-major. None: all N, the whole matrix.

    Returns:
        The rows `(B, Q, M)` as NumPy arrays (bfloat16 as float32), with the grid and the spec of the block.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if there is no such block, the run does not pass it once, or a position is out of range.

    Example:
        >>> model = keras.Sequential([keras.layers.Conv2D(8, 3), NonLocalBlock(8, subsample=2)])
        >>> found = attention_of(model, tf.random.normal((2, 9, 11, 3)), positions=[0, 62])
        >>> found.weights.shape, found.sizes, found.key_sizes
        ((2, 2, 12), (7, 9), (3, 4))
    """
    blocks = _blocks(model)
    name = resolve_block(block, blocks, joint="_")
    chosen = blocks[name]
    with _entering(chosen) as entered, keras.StatelessScope():
        model(x, training=False)
    check_calls("block", name, len(entered))
    ((x, key_mask),) = entered
    sizes = channels_last(x.shape, chosen.data_format)[1:-1]
    weights = chosen.attention(x, positions, key_mask)
    queries = np.arange(math.prod(sizes)) if positions is None else np.asarray(positions)
    return AttentionMap(weights, queries, sizes, chosen.spec)


def layers_of(model: keras.Layer, prefix: str = "") -> dict[str, keras.Layer]:
    """Return every layer in a network by its name; in a nested model it follows the model's name and a slash."""
    if not isinstance(model, keras.Layer):
        raise fail_type("model", "be a keras.Layer", model)
    found = {}
    for layer in model._flatten_layers(include_self=False, recursive=False):  # noqa: SLF001 - `layers` is for models
        found[f"{prefix}{layer.name}"] = layer
        found |= layers_of(layer, f"{prefix}{layer.name}/")
    return found


def _blocks(model: keras.Layer) -> dict[str, NonLocalBlock]:
    """Return every non-local block in a network by its name."""
    layers = layers_of(model)
    if isinstance(model, NonLocalBlock):
        return {model.name: model}
    return {name: layer for name, layer in layers.items() if isinstance(layer, NonLocalBlock)}


@contextmanager
def _entering(block: NonLocalBlock) -> Iterator[list[tuple[tf.Tensor, tf.Tensor | None]]]:
    """Keep what enters a block, and its key mask, while a network runs."""
    entered, own_call, eager = [], block.call, tf.config.functions_run_eagerly()

    def call(x: tf.Tensor, key_mask: Any = None, training: bool | None = None, mask: Any = None) -> tf.Tensor:
        entered.append((x, mask if key_mask is None else key_mask))
        return own_call(x, key_mask, training, mask)

    tf.config.run_functions_eagerly(run_eagerly=True)  # or what enters within a `tf.function` has no values
    block.call = call  # type: ignore[method-assign]  # which Keras looks up in the layer
    try:
        yield entered
    finally:
        del block.call
        tf.config.run_functions_eagerly(eager)
