"""A block of another implementation as canonical parameters and a spec."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Unpack

import numpy as np

from nonlocal_core.arguments import check_choice, check_sizes
from nonlocal_core.errors import fail_value
from nonlocal_core.files.conversion import to_numpy
from nonlocal_core.files.peers.arrays import canonical, shape_in_file
from nonlocal_core.files.peers.finding import find_peer_blocks, recognise
from nonlocal_core.files.peers.layouts import LAYOUTS
from nonlocal_core.files.peers.matching import Match, check_state_dict, match, under
from nonlocal_core.spec import NonLocalSpec
from nonlocal_core.spec.options import SpecOptions, check_options, normal_bias
from nonlocal_core.spec.parameters import param_shapes
from nonlocal_core.spec.presets import HALVES, PRESETS, preset_options

__all__ = ["AssumedOptionsWarning", "from_peer"]


class AssumedOptionsWarning(UserWarning):
    """Options of a block came from the preset of its implementation, since its file does not hold them."""


def from_peer(
    state_dict: Mapping[str, Any], *, peer: str, prefix: str = "", **options: Unpack[SpecOptions]
) -> tuple[dict[str, np.ndarray[Any, Any]], NonLocalSpec]:
    """Read a block of another implementation.

    The keys and shapes tell C, C', the rank, the biases, the norm, and of the form whether there are theta and phi and
    a concatenation; those of "alexhex7", "gluon" and "mmcv" also tell whether the block pools. What they do not tell is
    taken from `options`, or else from the preset of the implementation, with a warning.

    Keras' files have no fixed names for the layers of "keras_nonlocal": give `{"theta": ..., "phi": ..., "g": ...,
    "out": ...}`, the kernels as Keras has them, `(1.., in, out)`.

    Args:
        state_dict: from names to arrays of any library: what `torch.load(path, weights_only=True)`,
            `safetensors.numpy.load_file(path)` or `read_caffe2(path)` gives.
        peer: the implementation, one of those that `find_peer_blocks` gives.
        prefix: the name of the block, with or without the separator at its end; the "module." of DataParallel may be
            left out.
        options: options of the spec; they must not contradict the file.

    Returns:
        The canonical parameters, copies in the dtypes of the file (float32 for bfloat16), and the spec.

    Raises:
        TypeError: if an argument has a wrong type, or a value is no array of floats.
        ValueError: if there is no such block, keys are missing or left over, a shape is wrong, or an option contradicts
            the file.

    Warns:
        AssumedOptionsWarning: if options came from the preset; it names them, and giving them silences it.

    Example:
        >>> shapes = {"theta": (2, 4), "phi": (2, 4), "g": (2, 4), "W": (4, 2)}
        >>> file = {f"layer3.nl.{name}.weight": np.ones((*shape, 1, 1)) for name, shape in shapes.items()}
        >>> params, spec = from_peer(file, peer="alexhex7", prefix="layer3.nl", pairwise="dot_product", scale=None)
        >>> spec.inner_channels, spec.subsample, params["out.weight"].shape
        (2, None, (4, 2))
    """
    check_options(from_peer, options)
    check_state_dict(state_dict)
    check_choice("peer", peer, tuple(LAYOUTS))
    layout, preset = LAYOUTS[peer], PRESETS[peer]
    names = under(state_dict, prefix, layout.style.separator)
    block = match(peer, names)
    _check_keys(block, state_dict, peer, prefix)
    labels = {name: f"state_dict[{names[key]!r}]" for name, key in block.keys.items()}
    arrays = {name: to_numpy(labels[name], state_dict[names[key]]) for name, key in block.keys.items()}
    for name, key in block.twins.items():
        label = f"state_dict[{names[key]!r}]"
        if not np.array_equal(arrays[name], to_numpy(label, state_dict[names[key]]), equal_nan=True):
            raise fail_value(label, f"equal {labels[name]}, as {peer!r} writes it twice", "other values")

    kernel = arrays["g.weight"].shape
    rank = len(kernel) - 2
    if rank not in preset.ranks:
        rule = f"have {' or '.join(map(str, preset.ranks))} axes beside its channels for {peer!r}"
        raise fail_value(labels["g.weight"], rule, f"shape {kernel}")
    inner, channels = kernel[:-3:-1] if layout.style.kernel_first else kernel[:2]
    told = {**block.told, "inner_channels": inner}
    _check_agreement(block, told, options)
    assumed: dict[str, Any] = {"pairwise": block.forms[0]}
    if block.pooled is not None:
        assumed["subsample"] = HALVES[rank] if block.pooled else None
    for part, frames in layout.groups.items():
        if part in prefix:
            assumed["group_size"] = frames
    overrides = {**assumed, **options, **told}
    spec = NonLocalSpec(**preset_options(peer, channels=channels, rank=rank, overrides=overrides))
    shapes = param_shapes(spec)
    for name, shape in shapes.items():
        check_sizes(labels[name], arrays[name].shape, shape_in_file(name, shape, rank, layout.style))
    _warn(block, peer, spec, options)
    return {name: canonical(arrays[name], shape, layout.style) for name, shape in shapes.items()}, spec


def _check_keys(block: Match, state_dict: Mapping[str, Any], peer: str, prefix: str) -> None:
    """Check that the block has all keys and no others."""
    if block.is_none:
        found = ", ".join(f"{place!r} ({one})" for place, one in find_peer_blocks(state_dict))
        raise fail_value("prefix", f"name a block of {peer!r}", f"{prefix!r}; blocks found: {found or 'none'}")
    if not block.is_whole:
        other = recognise(state_dict, prefix)
        hint = "" if other is None else f"; these are the keys of {other!r}"
        rule = f"hold the keys of {peer!r} under {prefix!r} and no others"
        raise fail_value("state_dict", rule, f"{block}{hint}")


def _check_agreement(block: Match, told: Mapping[str, Any], options: SpecOptions) -> None:
    """Check that the options do not contradict what the keys and shapes tell."""
    given: dict[str, Any] = {**options}
    form = given.get("pairwise", block.forms[0])
    if form not in block.forms:
        raise fail_value("pairwise", f"be {' or '.join(map(repr, block.forms))} for this file", repr(form))
    if "bias" in given:
        given["bias"] = normal_bias(given["bias"], tuple(told["bias"]))
    for name, value in told.items():
        if given.get(name, value) != value:
            raise fail_value(name, f"be {value!r} for this file", repr(given[name]))
    if block.pooled is not None and "subsample" in given and (given["subsample"] is not None) != block.pooled:
        rule = "be a window for this file" if block.pooled else "be None for this file"
        raise fail_value("subsample", rule, repr(given["subsample"]))


def _warn(block: Match, peer: str, spec: NonLocalSpec, options: SpecOptions) -> None:
    """Name the options that neither the file nor the caller gave, of those that bear on what is computed."""
    open_ = {
        "pairwise": len(block.forms) > 1,
        "scale": True,
        "subsample": block.pooled is None,
        "subsample_at": spec.subsample is not None,
        "group_size": "group_size" in LAYOUTS[peer].free,
        "norm_epsilon": spec.norm is not None,
    }
    assumed = [f"{name}={getattr(spec, name)!r}" for name, holds in open_.items() if holds and name not in options]
    if assumed:
        message = f"the file does not say these options, which are those of the preset {peer!r}: {', '.join(assumed)}. "
        warnings.warn(message + "Give them to silence this.", AssumedOptionsWarning, stacklevel=3)
