"""A block as another implementation's files hold it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nonlocal_core.arguments import check_choice
from nonlocal_core.errors import fail_value
from nonlocal_core.files.conversion import to_numpy
from nonlocal_core.files.peers.arrays import shape_in_file
from nonlocal_core.files.peers.layouts import LAYOUTS, TORCH
from nonlocal_core.files.peers.matching import full_prefix
from nonlocal_core.geometry import window_of
from nonlocal_core.spec import NonLocalSpec
from nonlocal_core.spec.calls import check_spec
from nonlocal_core.spec.parameters import check_params, param_shapes
from nonlocal_core.spec.presets import HALVES, PRESETS

__all__ = ["to_peer"]

_PEERS = tuple(peer for peer, layout in LAYOUTS.items() if layout.style is TORCH)


def to_peer(
    params: Mapping[str, Any], spec: NonLocalSpec, *, peer: str, prefix: str = "", rank: int | None = None
) -> dict[str, np.ndarray[Any, Any]]:
    """Return parameters under the keys of another implementation in PyTorch, for its block's `load_state_dict`.

    The implementation must be able to compute what `spec` says. `zero_init` and `norm_momentum` may be any: they say
    how a block starts and trains, not what it computes. "sagan", "biggan" and "pretrained_biggan" are only read.

    Args:
        params: the canonical parameters, arrays of any library.
        spec: the block.
        peer: the implementation, one of those that `find_peer_blocks` gives for PyTorch.
        prefix: the name of the block, with or without the dot at its end.
        rank: the number of spatial axes of its kernels. None: as `spec` requires; where it requires none, the largest
            that the implementation has.

    Returns:
        Copies in the dtypes of the parameters. `num_batches_tracked`, which no result depends on, is not among them:
        PyTorch's batch norm does without.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if the parameters are not those of `spec`, or the implementation has no such block.

    Example:
        >>> from nonlocal_core import init_params
        >>> spec = NonLocalSpec(channels=4, pairwise="gaussian", subsample=(2, 2))
        >>> file = to_peer(init_params(spec, np.random.default_rng(0)), spec, peer="mmcv", prefix="block")
        >>> {name: array.shape for name, array in file.items()}
        ... # doctest: +NORMALIZE_WHITESPACE
        {'block.g.0.conv.weight': (2, 4, 1, 1), 'block.g.0.conv.bias': (2,),
         'block.conv_out.conv.weight': (4, 2, 1, 1), 'block.conv_out.conv.bias': (4,)}
    """
    check_spec(spec)
    check_choice("peer", peer, _PEERS)
    check_params(params, spec)
    layout = LAYOUTS[peer]
    required = max(PRESETS[peer].ranks) if spec.rank is None else spec.rank
    rank = required if rank is None else rank
    if spec.rank not in {None, rank}:
        raise fail_value("rank", f"be {spec.rank}, as the options require", repr(rank))
    _check_expressible(spec, peer, rank)
    variant = {"pooled": bool(layout.pooled) and _window(spec, rank) is not None, "normed": spec.norm is not None}
    keys, twins, start = layout.keys(**variant), layout.second_keys(**variant), full_prefix(prefix, TORCH.separator)
    file = {}
    for name, shape in param_shapes(spec).items():
        array = to_numpy(f"params[{name!r}]", params[name]).reshape(shape_in_file(name, shape, rank, TORCH))
        file[start + keys[name]] = array
        if name in twins:
            file[start + twins[name]] = array.copy()
    return file


def _check_expressible(spec: NonLocalSpec, peer: str, rank: int) -> None:
    """Check that the implementation computes the same under some of the options that it has."""
    layout, window = LAYOUTS[peer], _window(spec, rank)
    chosen = {option: getattr(spec, option) for option in layout.free - {"scale"}}
    if "scale" in layout.free and spec.scale_factor == 1:
        chosen["scale"] = None
    if layout.pooled:
        chosen["subsample"] = None if window is None else HALVES[rank]
    fixed = {option: getattr(spec, option) for option in ("pairwise", "norm", "inner_channels")}
    nearest = NonLocalSpec.preset(peer, channels=spec.channels, rank=rank, **fixed, **chosen)
    has, wanted = _meaning(nearest, rank), _meaning(spec, rank)
    for option in has:
        if has[option] != wanted[option]:
            can, got = getattr(nearest, option), getattr(spec, option)
            raise fail_value(option, f"be {can!r} for a block that {peer!r} can compute", repr(got))


def _meaning(spec: NonLocalSpec, rank: int) -> dict[str, Any]:
    """Return what the options mean for the numbers, so that two ways to say the same are equal."""
    window = _window(spec, rank)
    return {
        "scale": spec.scale_factor,
        "subsample": window,
        "subsample_at": None if window is None else spec.subsample_at,
        "axes": spec.axes,
        "group_size": spec.group_size,
        "bias": spec.bias,
        "norm_epsilon": None if spec.norm is None else spec.norm_epsilon,
        "residual": spec.residual,
    }


def _window(spec: NonLocalSpec, rank: int) -> tuple[int, ...] | None:
    """Return the pooling window with one entry for each axis; None if it pools nothing."""
    window = window_of(spec.subsample, rank)
    return None if window is None or set(window) == {1} else window
