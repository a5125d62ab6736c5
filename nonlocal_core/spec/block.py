"""What a non-local block computes, as one immutable value."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from nonlocal_core.arguments import (
    Size,
    check_bool,
    check_boolean,
    check_choice,
    check_finite,
    check_floating,
    check_int,
    check_sizes,
    read_json,
)
from nonlocal_core.errors import fail_type, fail_value
from nonlocal_core.geometry import VIDEO, Sets, interacting_axes, window_of
from nonlocal_core.spec.options import (
    SpecOptions,
    check_options,
    check_pairwise,
    default_inner,
    is_softmax,
    layers_of,
    normal_axes,
    normal_bias,
    normal_scale,
    normal_subsample,
)
from nonlocal_core.spec.presets import preset_options

__all__ = ["SPECIFICATION_VERSION", "NonLocalSpec"]

SPECIFICATION_VERSION = "2.0"
"""The version of the specification, `docs/specification.md`, that this package computes; it has one of its own."""


T = TypeVar("T")


def _refusing(cls: type[T]) -> type[T]:
    """Let a class refuse unknown options by their names, in the words of the blocks."""
    create = cls.__init__

    @wraps(create)
    def checked(self: T, *args: Any, **options: Any) -> None:
        check_options(cls, options)
        create(self, *args, **options)

    cls.__init__ = checked  # type: ignore[assignment, method-assign]
    return cls


@_refusing
@dataclasses.dataclass(frozen=True, kw_only=True)
class NonLocalSpec:
    """Say what a non-local block computes (Wang et al., CVPR 2018, equations 1 to 6).

    Options are validated and brought to one form on creation, so that specs of equal meaning are equal and
    have equal hashes.

    Args:
        channels: C, the channels of the input and of the output.
        inner_channels: C', the channels of theta, phi and g. None: half of `channels`, at least 1; the
            attribute then holds that number.
        pairwise: the form of f(x_i, x_j): "gaussian", "embedded_gaussian", "dot_product", "concatenation",
            or a function `f(theta (B, N, C'), phi (B, M, C')) -> scores (B, N, M)` on the backend's arrays,
            each score from its own theta_i and phi_j alone.
        normalize: how the scores of a `pairwise` function become weights: "softmax" over the keys, or
            "count", division by their number. None for the named forms, which fix it.
        scale: a factor on the scores. None: 1; "inner": C'^-1/2; "input": C^-1/2; or a finite, non-zero
            float.
        subsample: window and stride of the max pooling of the keys: an int for every interacting axis, or
            one int per spatial axis, which also fixes the rank. None: no pooling.
        subsample_at: pool what phi and g give ("projection", the paper's text) or what they get ("input",
            the official code).
        axes: the spatial axes along which positions interact: "all", for a video "space" or "time", or a
            tuple of axes counted from 0. The others act as batch.
        group_size: for a video with axes "all", the number of frames in one independent group.
        bias: whether the layers have biases: a bool, or a mapping over "theta", "phi", "g", "concat", "out"
            in which unnamed layers are True and "concat" is False; the attribute holds such a mapping.
        norm: what follows the last projection: None, "batch" (batch normalisation) or "affine" (a frozen one:
            its scale and shift alone).
        norm_epsilon: what is added to the variance.
        norm_momentum: the share of the new statistics in the running ones, between 0 and 1.
        residual: whether the input is added to the result.
        zero_init: whether a new block adds exactly nothing to its input.

    Raises:
        TypeError: if an option has a wrong type.
        ValueError: if an option has a wrong value, or two options contradict each other.

    Example:
        >>> spec = NonLocalSpec(channels=64, subsample=2, norm="batch")
        >>> spec.inner_channels
        32
        >>> spec.replace(pairwise="dot_product").pairwise
        'dot_product'
    """

    channels: int
    inner_channels: int = None  # type: ignore[assignment]  # a number after creation
    pairwise: str | Callable[[Any, Any], Any] = "embedded_gaussian"
    normalize: str | None = None
    scale: float | str | None = None
    subsample: int | tuple[int, ...] | None = None
    subsample_at: str = "projection"
    axes: str | tuple[int, ...] = "all"
    group_size: int | None = None
    bias: Mapping[str, bool] = True  # type: ignore[assignment]  # a mapping after creation
    norm: str | None = None
    norm_epsilon: float = 1e-5
    norm_momentum: float = 0.1
    residual: bool = True
    zero_init: bool = True

    if TYPE_CHECKING:  # what may be given is wider than the form to which it is brought

        def __init__(self, *, channels: int, **options: Unpack[SpecOptions]) -> None:
            """Take the options; see the class."""

    def __post_init__(self) -> None:
        """Validate every option and bring it to one form."""
        put = partial(object.__setattr__, self)
        put("channels", check_int("channels", self.channels))
        inner = default_inner(self.channels) if self.inner_channels is None else self.inner_channels
        put("inner_channels", check_int("inner_channels", inner))
        pairwise, normalize = check_pairwise(self.pairwise, self.normalize)
        put("pairwise", pairwise)
        put("normalize", normalize)
        put("scale", normal_scale(self.scale))
        put("subsample", normal_subsample(self.subsample))
        put("subsample_at", check_choice("subsample_at", self.subsample_at, ("projection", "input")))
        put("axes", normal_axes(self.axes))
        if self.group_size is not None:
            put("group_size", check_int("group_size", self.group_size, "be a positive int or None"))
        self._check_axes()
        put("bias", normal_bias(self.bias, self.layers))
        put("norm", check_choice("norm", self.norm, (None, "batch", "affine")))
        put("norm_epsilon", check_finite("norm_epsilon", self.norm_epsilon, "be a positive, finite float"))
        if self.norm_epsilon <= 0:
            raise fail_value("norm_epsilon", "be a positive, finite float", self.norm_epsilon)
        put("norm_momentum", check_finite("norm_momentum", self.norm_momentum, "be a float between 0 and 1"))
        if not 0 <= self.norm_momentum <= 1:
            raise fail_value("norm_momentum", "be a float between 0 and 1", self.norm_momentum)
        put("residual", check_bool("residual", self.residual))
        put("zero_init", check_bool("zero_init", self.zero_init))

    def _check_axes(self) -> None:
        """Check the options that speak of spatial axes against each other."""
        if self.group_size is not None and self.axes != "all":
            raise fail_value("group_size", "be None unless `axes` is 'all'", self.group_size)
        window = self.subsample if isinstance(self.subsample, tuple) else None
        if window is None:
            return
        needed = VIDEO if self.group_size is not None or self.axes in {"space", "time"} else None
        if needed and len(window) != needed:
            raise fail_value("subsample", "have one entry for each of the 3 axes of a video", window)
        inner = interacting_axes(self.axes, len(window))
        if max(inner) >= len(window):
            raise fail_value("axes", f"be below the {len(window)} axes that `subsample` names", inner)
        if any(size > 1 for axis, size in enumerate(window) if axis not in inner):
            raise fail_value("subsample", f"be 1 on every axis that is not in `axes` ({self.axes!r})", window)

    # Derived values

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that this form has, in the order of the computation."""
        return layers_of(self.pairwise)

    @property
    def has_embedding(self) -> bool:
        """Whether theta and phi are projections (False: both are the input itself)."""
        return self.pairwise != "gaussian"

    @property
    def is_softmax(self) -> bool:
        """Whether weights are a softmax over the keys (False: scores divided by their number)."""
        return is_softmax(self.pairwise, self.normalize)

    @property
    def scale_factor(self) -> float:
        """The number that multiplies the scores."""
        named = {None: 1.0, "inner": self.inner_channels**-0.5, "input": self.channels**-0.5}
        return self.scale if isinstance(self.scale, float) else named[self.scale]

    @property
    def rank(self) -> int | None:
        """The number of spatial axes that the options require (None: 1, 2 or 3)."""
        if isinstance(self.subsample, tuple):
            return len(self.subsample)
        return VIDEO if self.group_size is not None or self.axes in {"space", "time"} else None

    def sets(self, spatial: Sequence[int]) -> Sets:
        """Return how the positions of a grid divide into sets, and how the keys of a set are pooled.

        Args:
            spatial: the sizes S1..Sk of the spatial axes; they must have passed `check_input`.

        Returns:
            The sets, as sizes and axes alone.
        """
        inner, window = interacting_axes(self.axes, len(spatial)), window_of(self.subsample, len(spatial))
        chosen = None if window is None else tuple(window[axis] for axis in inner)
        if self.group_size is not None:
            frames, height, width = spatial
            grid = (frames // self.group_size, self.group_size, height, width)
            return Sets(grid=grid, outer=(0,), inner=(1, 2, 3), window=chosen)
        outer = tuple(axis for axis in range(len(spatial)) if axis not in inner)
        return Sets(grid=tuple(spatial), outer=outer, inner=inner, window=chosen)

    def check_input(
        self,
        shape: Sequence[Size],
        *,
        dtype: str = "float32",
        mask_shape: Sequence[Size] | None = None,
        mask_dtype: str = "bool",
        training: bool = False,
    ) -> None:
        """Check an input against this spec; every backend calls this before it computes.

        Args:
            shape: `(B, S1..Sk, C)`, channels last whatever the layout of the backend. None stands for a size
                that is unknown or symbolic; what depends on it is not checked.
            dtype: the name of the dtype of the input.
            mask_shape: the shape of the key mask, if there is one.
            mask_dtype: the name of the dtype of the key mask.
            training: whether batch normalisation takes its statistics from this input.

        Raises:
            TypeError: if the input is not floating point or the mask is not boolean.
            ValueError: if a shape does not fit the spec.

        Example:
            >>> NonLocalSpec(channels=4, subsample=2).check_input((1, 1, 8, 4))
            Traceback (most recent call last):
            ValueError: `subsample` must leave at least one window on spatial axis 0. Got size 1 and window 2.
        """
        check_bool("training", training)
        check_floating("x", dtype)
        self._check_grid(shape)
        if mask_shape is not None:
            check_boolean("key_mask", mask_dtype)
            check_sizes("key_mask", mask_shape, shape[:-1])
        if training and self.norm == "batch" and None not in shape[:-1]:
            values = math.prod(shape[:-1])  # type: ignore[arg-type]  # no size is None here
            if values <= 1:
                rule = "have more than one value per channel in training with norm 'batch'"
                raise fail_value("x", rule, values)

    def _check_grid(self, shape: Sequence[Size]) -> None:
        """Check the rank, the channels and what groups and windows need of the spatial sizes."""
        rank = len(shape) - 2
        got = f"{rank} spatial axes" if rank >= 0 else f"shape {tuple(shape)}"
        if not 1 <= rank <= VIDEO:
            raise fail_value("x", "have 1, 2 or 3 spatial axes beside batch and channels", got)
        if self.rank not in {None, rank}:
            raise fail_value("x", f"have {self.rank} spatial axes, as the options require", got)
        if isinstance(self.axes, tuple) and max(self.axes) >= rank:
            raise fail_value("axes", f"be below the number of spatial axes, {rank}", self.axes)
        if shape[-1] not in {None, self.channels}:
            raise fail_value("x", f"have {self.channels} channels", f"{shape[-1]} channels")
        spatial = shape[1:-1]
        for axis, size in enumerate(spatial):
            if size is not None and size < 1:
                got = f"size {size} on axis {axis}"
                raise fail_value("x", "have at least one position on every spatial axis", got)
        if self.group_size is not None and spatial[0] is not None and spatial[0] % self.group_size:
            got = f"{self.group_size} for {spatial[0]} frames"
            raise fail_value("group_size", "divide the number of frames", got)
        self._check_windows(spatial)

    def _check_windows(self, spatial: Sequence[Size]) -> None:
        """Check that every axis on which keys are pooled holds a window."""
        window = window_of(self.subsample, len(spatial))
        if window is None:
            return
        sizes = spatial if self.group_size is None else (self.group_size, *spatial[1:])
        inner = interacting_axes(self.axes, len(spatial))
        for axis, (size, length) in enumerate(zip(sizes, window, strict=True)):
            if axis in inner and size is not None and size < length:
                rule = f"leave at least one window on spatial axis {axis}"
                raise fail_value("subsample", rule, f"size {size} and window {length}")

    # Copies and files

    def replace(self, **changes: Any) -> NonLocalSpec:
        """Return a copy with some options changed.

        An `inner_channels` that is half of `channels` follows a change of `channels`, and the biases of
        layers that a new `pairwise` lacks are dropped, unless the option itself is among the changes.
        """
        if "channels" in changes and self.inner_channels == default_inner(self.channels):
            changes = {"inner_channels": None, **changes}
        if "pairwise" in changes:
            changes = {"bias": self._bias_for(changes["pairwise"]), **changes}
        return dataclasses.replace(self, **changes)

    def changed_options(self) -> dict[str, Any]:
        """Return the options that differ from their defaults, without `channels`.

        `NonLocalSpec(channels=spec.channels, **spec.changed_options())` is the spec again.
        """
        defaults = {field.name: field.default for field in dataclasses.fields(self) if field.name != "channels"}
        defaults |= {"inner_channels": default_inner(self.channels), "bias": {}}
        usual = normal_bias(bias=True, layers=self.layers)
        bias = {layer: not usual[layer] for layer in self.layers if self.bias[layer] != usual[layer]}
        options = {**{name: getattr(self, name) for name in defaults}, "bias": bias}
        return {name: value for name, value in options.items() if value != defaults[name]}

    def _bias_for(self, pairwise: Any) -> bool | dict[str, bool]:
        """Return the biases with another form: all off stays all off, the layers both have keep theirs."""
        if not any(self.bias.values()):
            return False
        kept = layers_of(pairwise)
        return {layer: has for layer, has in self.bias.items() if layer in kept}

    def to_json(self) -> str:
        """Return the options as JSON text, which `from_json` reads back to an equal spec.

        Raises:
            ValueError: if `pairwise` is a function.
        """
        if not isinstance(self.pairwise, str):
            raise fail_value("pairwise", "be one of the named forms to be written as JSON", self.pairwise)
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return json.dumps({**fields, "bias": dict(fields["bias"])})

    @classmethod
    def from_json(cls, text: str) -> NonLocalSpec:
        """Return the spec that `to_json` wrote.

        Raises:
            ValueError: if the text is not a JSON object, or names an option that is unknown or one twice.
        """
        try:
            options = read_json(text)
        except (TypeError, ValueError) as error:
            message = f"`text` must be JSON. {error}"
            raise ValueError(message) from None
        if not isinstance(options, dict):
            raise fail_value("text", "be a JSON object", text)
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in options if name not in known]
        if unknown or "channels" not in options:
            raise fail_value("text", f"have 'channels' and no options beside {known}", list(options))
        return cls(**options)

    @classmethod
    def preset(cls, name: str, *, channels: int, rank: int = 3, **overrides: Any) -> NonLocalSpec:
        """Return the spec with which a block computes exactly what a public implementation computes.

        See `nonlocal_core.spec.presets` for the names and for what each fixes.

        Args:
            name: the implementation, for example "official" or "mmcv".
            channels: C.
            rank: the number of spatial axes, which decides the pooling window.
            overrides: options of the spec; `pairwise` and `norm` are settled first, then what the
                implementation derives from them, then the others replace what they name.

        Raises:
            TypeError: if an override is no option of the spec.
            ValueError: if the name is unknown, or the implementation lacks the form or the rank.

        Example:
            >>> NonLocalSpec.preset("slowfast", channels=1024).scale
            'inner'
        """
        check_options(cls.preset, overrides)
        return cls(**preset_options(name, channels=channels, rank=rank, overrides=overrides))


def check_spec(spec: Any) -> None:
    """Check that an argument is a spec."""
    if not isinstance(spec, NonLocalSpec):
        raise fail_type("spec", "be a NonLocalSpec", spec)


def options_of(spec: NonLocalSpec) -> dict[str, Any]:
    """Return all options of a spec, with which it is made again."""
    check_spec(spec)
    return vars(spec)
