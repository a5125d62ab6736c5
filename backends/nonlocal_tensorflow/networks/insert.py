"""Non-local blocks put into networks, and taken out again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack

import keras

from nonlocal_core.errors import fail_type, fail_value
from nonlocal_core.networks.insertion import CHILD, Insertion, check_flow, fail_taken, resolve_places
from nonlocal_core.networks.recipes import Positions
from nonlocal_core.spec.options import check_options
from nonlocal_tensorflow.arrays import channels_last
from nonlocal_tensorflow.block import NonLocalBlock
from nonlocal_tensorflow.layers import BlockOptions
from nonlocal_tensorflow.networks.look import layers_of

__all__ = ["insert_nonlocal", "remove_nonlocal"]

Edit = Callable[[str, Any], NonLocalBlock] | None
"""What happens at a layer: from its name and its output the block that follows; None takes the layer out."""

_JOINED = f"_{CHILD}"


def insert_nonlocal(
    model: keras.Model,
    after: Sequence[str] | Positions,
    *,
    method: str = "auto",
    data_format: str | None = None,
    synchronized: bool = False,
    sharded_axis: int | None = None,
    **options: Unpack[BlockOptions],
) -> tuple[keras.Model, list[Insertion]]:
    """Return a network with new non-local blocks in it; it computes the same until they are trained.

    It consists of the layers of the old network, which share their weights and stay usable, and of a layer
    `<place>_nonlocal_block` after each place, with the dtype policy of the place. It is not compiled; a class with a
    constructor of its own becomes a plain functional or Sequential model.

    The `output` of a shared layer is that in the old network, and with the inputs of the new one makes no model. For
    features of the new network clone it first, with `keras.models.clone_model` and `set_weights`.

    Args:
        model: the network, functional or Sequential. Nested models may be either too.
        after: the names of layers, or the places that `nonlocal_core.recipes.positions` gives. In a nested model the
            name of a layer follows the model's and a slash, as in "backbone/conv4_block6_out".
        method: as in `NonLocalBlock`.
        data_format: as in `NonLocalBlock`; None: that of the layer at the place, if it has one.
        synchronized: as in `NonLocalBlock`.
        sharded_axis: as in `NonLocalBlock`; the network must then compute each part of its input by itself.
        **options: those of `NonLocalBlock`, the options of `nonlocal_core.NonLocalSpec` and the arguments for its
            layers, but `channels`, which is seen.

    Returns:
        The network, and what was inserted, in the order of `after`.

    Raises:
        TypeError: if an argument or an option has a wrong type, or the network is of another kind.
        ValueError: if a place cannot take a block, or an option has a wrong value.

    Example:
        >>> layers = [keras.layers.Conv2D(16, 3, strides=2, name="stem"), keras.layers.Conv2D(4, 1)]
        >>> model, x = keras.Sequential([keras.Input((17, 13, 3)), *layers]), keras.random.normal((2, 17, 13, 3))
        >>> larger, insertions = insert_nonlocal(model, ["stem"], norm="batch")
        >>> print(*insertions)
        stem_nonlocal_block after stem: embedded_gaussian, 16 channels on 8 x 6, 584 parameters
        >>> bool(keras.ops.all(larger(x) == model(x)))
        True
    """
    check_options(insert_nonlocal, options, BlockOptions.__annotations__)
    _graph(model)  # refuses other kinds before a name is looked for
    layers = {name: layer for name, layer in layers_of(model).items() if not isinstance(layer, keras.layers.InputLayer)}
    places = resolve_places(after, layers)
    for place in places:
        if f"{place}{_JOINED}" in layers:
            raise fail_taken(place)
    flows: dict[str, list[Any]] = {place: [] for place in places}
    insertions = {}

    def block_after(place: str, y: Any) -> NonLocalBlock:
        layer = layers[place]
        flows[place].append(y)
        check_flow(place, flows[place])
        formats = (data_format, getattr(layer, "data_format", None), keras.config.image_data_format())
        own_format = next(choice for choice in formats if choice is not None)
        shape = channels_last(y.shape, own_format)
        block = NonLocalBlock(
            shape[-1],
            method=method,
            data_format=own_format,
            synchronized=synchronized,
            sharded_axis=sharded_axis,
            name=f"{layer.name}{_JOINED}",
            # A layer may give another dtype than that of its policy, and what flows must stay as it is.
            dtype=layer.dtype_policy if layer.compute_dtype == y.dtype else y.dtype,
            **options,
        )
        block.build(y.shape)
        insertions[place] = Insertion(place, f"{place}{_JOINED}", shape, block.spec)
        return block

    larger = _edited(model, dict.fromkeys(places, block_after))
    for place in places:
        check_flow(place, flows[place])
    return larger, [insertions[place] for place in places]


def remove_nonlocal(model: keras.Model) -> keras.Model:
    """Return a network without the blocks that `insert_nonlocal` put in; it shares the layers of the given one.

    Args:
        model: the network.

    Raises:
        TypeError: if `model` is neither functional nor Sequential.
        ValueError: if no block was inserted.

    Example:
        >>> model = keras.Sequential([keras.Input((7, 5, 3)), keras.layers.Conv2D(16, 3, name="stem")])
        >>> larger, _ = insert_nonlocal(model, ["stem"])
        >>> [layer.name for layer in remove_nonlocal(larger).layers]
        ['stem']
    """
    _graph(model)
    layers = layers_of(model)
    inserted = [
        name
        for name, layer in layers.items()
        if isinstance(layer, NonLocalBlock) and name.endswith(_JOINED) and name.removesuffix(_JOINED) in layers
    ]
    if not inserted:
        raise fail_value("model", "have at least one inserted non-local block", "none")
    return _edited(model, dict.fromkeys(inserted))


def _edited(model: keras.Model, edits: Mapping[str, Edit], prefix: str = "") -> keras.Model:
    """Return a network of the same layers with some of them taken out, and others followed by a block."""
    graph, called = _graph(model), []

    def stands_for(layer: Any) -> Any:
        path = f"{prefix}{layer.name}/"
        return _edited(layer, edits, path) if any(name.startswith(path) for name in edits) else layer

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        name = f"{prefix}{layer.name}"
        edit = edits.get(name)
        if edit is None and name in edits:
            return args[0]
        y = layer(*args, **kwargs)
        called.append(layer)
        if edit is not None:
            called.append(edit(name, y))
            y = called[-1](y)
        return y

    # With inputs of its own, since the `output` of a shared layer is the old network's: mixing the two raises an error.
    own = {
        # The configuration has no `optional` before Keras 3.13.
        id(layer.output): type(layer).from_config({**layer.get_config(), "optional": layer.optional}).output
        for layer in graph.layers
        if isinstance(layer, keras.layers.InputLayer)
    }
    inputs = keras.tree.map_structure(lambda x: own[id(x)], graph.input)
    edited = keras.models.clone_model(graph, input_tensors=inputs, clone_function=stands_for, call_function=call)
    plain = keras.Sequential if isinstance(model, keras.Sequential) else type(graph)
    # A class with a constructor of its own cannot be made from layers, or from inputs and outputs.
    made = type(model) if type(model).__init__ is plain.__init__ else plain
    if plain is keras.Sequential:
        # What computes the masks is called too, and is no layer.
        chain = [layer for layer in called if isinstance(layer, keras.Layer)]
        return made([*edited.inputs, *chain], name=model.name)
    return made(edited.input, edited.output, name=model.name)


def _graph(model: Any) -> keras.Model:
    """Return the graph of a network as a plain functional model, which is not compiled."""
    if isinstance(model, keras.Sequential) and type(model).call is keras.Sequential.call:
        if not hasattr(model, "inputs"):
            raise fail_value("model", "be built, so that the shapes in it are known", repr(model))
        return keras.Model(model.inputs, model.outputs, name=model.name)
    if isinstance(model, keras.Model) and isinstance(model, keras.Function):
        graph = keras.Model(model.input, model.output, name=model.name)
        if type(model).call is type(graph).call:
            return graph
    rule = "be functional or Sequential; a class of one's own calls a NonLocalBlock as any other layer"
    raise fail_type("model", rule, model)
