"""What is asked of a network that holds non-local blocks: are they the identity, and what do they attend to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nonlocal_core.errors import fail_type
from nonlocal_core.networks.attention_map import AttentionMap
from nonlocal_core.networks.insertion import call_arguments, check_calls, check_identities, resolve_block
from nonlocal_torch.block import NonLocalBlock
from nonlocal_torch.parameters import in_evaluation

__all__ = ["attention_of", "check_identity", "check_module", "run_once"]


def check_identity(model: nn.Module) -> None:
    """Check that every non-local block of a network is the identity, as new ones are.

    A network that initialises its layers again after the insertion makes its blocks anything but that.

    Args:
        model: the network.

    Raises:
        TypeError: if `model` is no module.
        ValueError: if there is no block, or one is not the identity; the error names it.

    Example:
        >>> from nonlocal_torch import NonLocalBlock
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), NonLocalBlock(8))
        >>> check_identity(model)
        >>> _ = nn.init.ones_(model[1].out.bias)
        >>> check_identity(model)
        Traceback (most recent call last):
        ValueError: `model` must have blocks that are the identity, with zeros in their last factor. Got other values \
in out.bias of '1', as after another initialisation.
    """
    check_identities({name: (block.export_params(), block.spec) for name, block in _blocks(model).items()})


def attention_of(
    model: nn.Module, x: Any, block: str | None = None, positions: Sequence[int] | Tensor | None = None
) -> AttentionMap:
    """Return the weights of a non-local block inside a network, for what enters it when the network runs.

    The run is in evaluation and without gradients; mode, statistics and random state stay as they are.

    Args:
        model: the network.
        x: its input: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
        block: the name of the block or of the place before it; None: the only one.
        positions: flat indices of Q queries on the grid of the block, row-major. None: all N, the whole matrix.

    Returns:
        The rows `(B, Q, M)` as NumPy arrays (bfloat16 as float32), with the grid and the spec of the block.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if there is no such block, the run does not pass it once, or a position is out of range.

    Example:
        >>> from nonlocal_torch import NonLocalBlock
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), NonLocalBlock(8, subsample=2))
        >>> found = attention_of(model, torch.randn(2, 3, 9, 11), positions=[0, 62])
        >>> found.weights.shape, found.sizes, found.key_sizes
        ((2, 2, 12), (7, 9), (3, 4))
    """
    blocks = _blocks(model)
    name = resolve_block(block, blocks)
    chosen = blocks[name]
    found: list[tuple[Any, ...]] = []

    def look(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # At once: the network may write over what enters, and has its own autocast.
        entered = dict(zip(("x", "key_mask"), args, strict=False)) | kwargs
        weights = chosen.attention(**entered, positions=positions)
        shape = entered["x"].shape
        found.append((weights, positions, shape[1:-1] if chosen.data_format == "channels_last" else shape[2:]))

    handle = chosen.register_forward_pre_hook(look, with_kwargs=True)
    try:
        run_once(model, x)
    finally:
        handle.remove()
    check_calls("block", name, len(found))
    ((weights, queries, sizes),) = found
    return AttentionMap(weights, queries, sizes, chosen.spec)


def check_module(model: nn.Module) -> None:
    """Check that a network is a module."""
    if not isinstance(model, nn.Module):
        raise fail_type("model", "be a torch.nn.Module", model)


def run_once(model: nn.Module, inputs: Any) -> None:
    """Run a network in evaluation, without gradients; it stays as it is, and so does the random state."""
    args, kwargs = call_arguments(inputs)
    gpus = {parameter.device.index for parameter in model.parameters() if parameter.is_cuda}
    with in_evaluation(model), torch.random.fork_rng(sorted(gpus)):
        model(*args, **kwargs)


def _blocks(model: nn.Module) -> dict[str, NonLocalBlock]:
    """Return every non-local block in a network by its name."""
    check_module(model)
    return {name: module for name, module in model.named_modules() if isinstance(module, NonLocalBlock)}
