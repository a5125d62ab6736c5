"""Presets: the options with which a block computes what a public implementation computes.

A preset is settled in three steps: the form, the norm and the rank, which the implementation must have; what
it derives from these and from the channels; then the other overrides, which replace what they name. The
documentation prints `PRESETS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from nonlocal_core.arguments import check_int
from nonlocal_core.errors import fail_type, fail_value
from nonlocal_core.spec.options import PAIRWISE, default_inner

__all__ = ["PRESETS", "Preset", "preset_options"]

_GAUSSIAN, _EMBEDDED, _DOT, _CONCAT = PAIRWISE
_ALL = (_EMBEDDED, _GAUSSIAN, _DOT, _CONCAT)
HALVES = {1: (2,), 2: (2, 2), 3: (1, 2, 2)}
_NEIGHBOURS = {1: (2,), 2: (1, 2), 3: (1, 1, 2)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """One row of the table of presets.

    Args:
        project: the public implementation, by the name of its repository.
        forms: its pairwise forms; the first is the default.
        norms: its norms; the first is the default.
        ranks: the numbers of spatial axes that it takes.
        window: its pooling window for each rank; None: no pooling, unless `subsample` is given.
        pooled: the forms that it pools.
        subsample_at: where it pools.
        scale: the factor on the scores of the embedded Gaussian form; its other forms have none. "root" is
            the square root of C'.
        divisor: None: C' is half of C; otherwise C' is near C / `divisor`, a multiple of 8.
        bias: whether its layers have biases.
        bias_before_norm: whether its last projection keeps its bias when a norm follows.
        concat_bias: whether its concatenation has a bias.
        norm_epsilon: what it adds to the variance.
        zero_init: whether its new block adds nothing to the input.
        refused: why some form of it is not among `forms`, for the error message.
    """

    project: str
    forms: tuple[str, ...]
    norms: tuple[str | None, ...]
    ranks: tuple[int, ...]
    window: Mapping[int, tuple[int, ...]] | None = None
    pooled: tuple[str, ...] = _ALL
    subsample_at: str = "projection"
    scale: str | None = None
    divisor: int | None = None
    bias: bool = True
    bias_before_norm: bool = True
    concat_bias: bool = False
    norm_epsilon: float = 1e-5
    zero_init: bool = True
    refused: str = ""


_OFFICIAL = Preset(
    project="facebookresearch/video-nonlocal-net",
    forms=(_EMBEDDED, _DOT),
    norms=("batch", None, "affine"),
    ranks=(3,),
    window=HALVES,
    subsample_at="input",
    scale="inner",
    norm_epsilon=1.0000001e-5,
)

# Its theta and phi have C / 8 rows and its g C / 2, and one gain stands for all channels of gamma: a new block has more
# parameters here, and a file of it is read exactly, with zero rows in theta and phi and the gain in every channel.
_BIGGAN = Preset(
    project="ajbrock/BigGAN-PyTorch",
    forms=(_EMBEDDED,),
    norms=("affine",),
    ranks=(2,),
    window=HALVES,
    bias=False,
)

# Its configuration zeroes gamma if asked to; the class alone does not. The window is its configuration's.
_SLOWFAST = Preset(
    project="facebookresearch/SlowFast",
    forms=(_EMBEDDED, _DOT),
    norms=("batch",),
    ranks=(3,),
    window=HALVES,
    subsample_at="input",
    scale="inner",
    zero_init=False,
)

PRESETS: Mapping[str, Preset] = {
    "official": _OFFICIAL,
    # The nets for long clips: their backbone has the affine layers, and these blocks have no norm at all.
    "official_affine": dataclasses.replace(_OFFICIAL, norms=(None, "affine", "batch")),
    "slowfast": _SLOWFAST,
    # Defaults of `create_nonlocal`, which makes the layers from channels; the class itself is given layers.
    "pytorchvideo": Preset(
        project="facebookresearch/pytorchvideo",
        forms=(_EMBEDDED, _DOT),
        norms=("batch", None, "affine"),
        ranks=(3,),
        subsample_at="input",
        scale="inner",
        zero_init=False,
    ),
    # The network of its file i3d_r50_nl_kinetics.pth.
    "pytorch_resnet3d": dataclasses.replace(_SLOWFAST, project="Tushar-N/pytorch-resnet3d", forms=(_EMBEDDED,)),
    # Its concatenation cannot be trained (it writes over what the gradient needs), but its values are right.
    "mmcv": Preset(
        project="open-mmlab/mmcv",
        forms=_ALL,
        norms=(None, "batch"),
        ranks=(1, 2, 3),
        scale="inner",
        bias_before_norm=False,
    ),
    "alexhex7": Preset(
        project="AlexHex7/Non-local_pytorch",
        forms=_ALL,
        norms=("batch", None),
        ranks=(1, 2, 3),
        window=HALVES,
    ),
    "tea1528": Preset(
        project="tea1528/Non-Local-NN-Pytorch",
        forms=_ALL,
        norms=("batch", None),
        ranks=(1, 2, 3),
        concat_bias=True,
    ),
    "timm": Preset(
        project="huggingface/pytorch-image-models",
        forms=(_EMBEDDED,),
        norms=("batch",),
        ranks=(2,),
        scale="input",
        divisor=8,
    ),
    # Its PyTorch half gives 0.9 as the share of the new statistics, its MXNet half as that of the old. The
    # share here is that of the latter, 0.1.
    "gluon": Preset(
        project="dmlc/gluon-cv",
        forms=(_EMBEDDED,),
        norms=("batch", None),
        ranks=(2, 3),
        scale="inner",
        refused="it fails on the others, and its form without an embedding loses g as well",
    ),
    # It divides by C'^-1/2 where C'^1/2 is meant: its scores grow with the square root of C'. `scale=None` is
    # its `use_scale=False`.
    "mmdet2019": Preset(
        project="xvjiarui/GCNet",
        forms=(_EMBEDDED, _DOT),
        norms=(None, "batch"),
        ranks=(2,),
        scale="root",
        bias_before_norm=False,
    ),
    "sagan": dataclasses.replace(_BIGGAN, project="voletiv/self-attention-GAN-pytorch", bias=True),
    "biggan": _BIGGAN,
    "pretrained_biggan": dataclasses.replace(_BIGGAN, project="huggingface/pytorch-pretrained-BigGAN"),
    # It pools pairs of flattened positions: a window on the last axis, if that axis is even.
    "keras_nonlocal": Preset(
        project="titu1994/keras-non-local-nets",
        forms=(_EMBEDDED, _GAUSSIAN, _DOT),
        norms=(None,),
        ranks=(1, 2, 3),
        window=_NEIGHBOURS,
        pooled=(_EMBEDDED,),
        bias=False,
        zero_init=False,
        refused="its concatenation raises an error",
    ),
}
"""The rows of the table of presets, by name."""


def preset_options(name: str, *, channels: int, rank: int, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `NonLocalSpec` for a preset.

    Args:
        name: one of the names in `PRESETS`.
        channels: C.
        rank: the number of spatial axes, which decides the pooling window.
        overrides: options of the spec that replace those of the preset; the preset follows `pairwise` and
            `norm`.

    Returns:
        Options that are not validated yet: `NonLocalSpec` does that.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if the name is unknown, or the implementation lacks the form, the norm or the rank.

    Example:
        >>> options = preset_options("timm", channels=100, rank=2, overrides={"zero_init": False})
        >>> options["inner_channels"], options["scale"], options["zero_init"]
        (16, 'input', False)
    """
    preset = _find(name)
    channels, rank = check_int("channels", channels), check_int("rank", rank)
    pairwise = overrides.get("pairwise", preset.forms[0])
    norm = overrides.get("norm", preset.norms[0])
    if not (isinstance(pairwise, str) or callable(pairwise)):
        raise fail_type("pairwise", "be a string or a function", pairwise)
    if not isinstance(norm, str | None):
        raise fail_type("norm", "be a string or None", norm)
    _check_offered(name, "pairwise", pairwise, preset.forms)
    _check_offered(name, "norm", norm, preset.norms)
    _check_offered(name, "rank", rank, preset.ranks)
    inner = overrides.get("inner_channels")
    if inner is None:
        inner = _default_inner(preset, channels)
    derived = {
        "channels": channels,
        "inner_channels": inner,
        "pairwise": pairwise,
        "scale": _scale(preset, pairwise, inner),
        "subsample": None if preset.window is None or pairwise not in preset.pooled else preset.window[rank],
        "subsample_at": preset.subsample_at,
        "bias": _bias(preset, pairwise, norm),
        "norm": norm,
        "norm_epsilon": preset.norm_epsilon,
        "zero_init": preset.zero_init,
    }
    return derived | {option: value for option, value in overrides.items() if option != "inner_channels"}


def _find(name: str) -> Preset:
    if not isinstance(name, str):
        raise fail_type("name", "be the name of a preset", name)
    if name not in PRESETS:
        raise fail_value("name", f"be one of {_listed(PRESETS)}", repr(name))
    return PRESETS[name]


def _check_offered(name: str, argument: str, value: object, offered: Collection[object]) -> None:
    if value not in offered:
        rule = f"be {'' if len(offered) == 1 else 'one of '}{_listed(offered)} for the preset {name!r}"
        if argument == "pairwise" and PRESETS[name].refused:
            rule += f" ({PRESETS[name].refused})"
        raise fail_value(argument, rule, repr(value))


def _default_inner(preset: Preset, channels: int) -> int:
    """Return C': half of C, or the fraction of C rounded to a multiple of 8 that is not far below it."""
    if preset.divisor is None:
        return default_inner(channels)
    wanted = channels / preset.divisor
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * wanted else rounded + 8


def _scale(preset: Preset, pairwise: object, inner: object) -> float | str | None:
    if pairwise != _EMBEDDED:
        return None
    return check_int("inner_channels", inner) ** 0.5 if preset.scale == "root" else preset.scale


def _bias(preset: Preset, pairwise: object, norm: object) -> bool | dict[str, bool]:
    if not preset.bias:
        return False
    bias = {"out": norm is None or preset.bias_before_norm}
    return bias | {"concat": preset.concat_bias} if pairwise == _CONCAT else bias


def _listed(values: Collection[object]) -> str:
    return ", ".join(map(repr, values))
