"""What a case is: a spec, a shape and seeded data on which a fault has nowhere to hide."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from nonlocal_core import NonLocalSpec, param_shapes
from nonlocal_core.reference.block import branch

__all__ = ["Array", "Case", "Data", "dtype_named"]

Array = np.ndarray[Any, Any]

CHANNELS, INNER = 7, 5
GRAINS = 8.0
"""How many steps there are from 0 to 1 where products must be exact, so that equal positions stay equal."""

CONDITION = 8.0
"""By how much batch normalisation in training may magnify a rounding: an eighth of what the checks allow."""

SEEDS = 256
"""How many seeds are tried for data that magnify it less."""


@dataclasses.dataclass(frozen=True)
class Data:
    """The arrays of a case, in one dtype; no parameter is zero, no statistic trivial."""

    x: Array
    params: dict[str, Array]
    dz: Array
    key_mask: Array | None

    def wide(self) -> Data:
        """Return the same numbers in float64, for the reference."""
        params = {name: array.astype(np.float64) for name, array in self.params.items()}
        return Data(self.x.astype(np.float64), params, self.dz.astype(np.float64), self.key_mask)


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration of the block.

    Args:
        name: unique, without "-".
        options: the options of the spec.
        spatial: the sizes S1..Sk.
        batch: B.
        mask: None, "some" for a random mask whose last sample of several has no key at all, or "all" where no sample
            has one.
        training: whether batch normalisation uses the statistics of the input.
        ties: whether positions repeat, so that windows of the pooling hold ties, before and after a projection.
        narrow: whether it runs in the narrower dtypes of a driver, or in the widest alone.
        wide: whether a check that is run in the narrower ones runs in the widest as well.
        seed: of the data, beside the name; None: the first whose data are well conditioned, so that a right
            implementation need not fail by its rounding.
        cut: the axis of the input that devices cut, 0 for the batch, and how many they are; None: there is one.
    """

    name: str
    options: Mapping[str, Any]
    spatial: tuple[int, ...]
    batch: int = 2
    mask: str | None = None
    training: bool = False
    ties: bool = False
    narrow: bool = True
    wide: bool = True
    seed: int | None = None
    cut: tuple[int, int] | None = None

    @functools.cached_property
    def spec(self) -> NonLocalSpec:
        """The spec of the block."""
        return NonLocalSpec(**{"channels": CHANNELS, "inner_channels": INNER, **self.options})

    @property
    def rank(self) -> int:
        """The number of spatial axes."""
        return len(self.spatial)

    @property
    def is_pooled(self) -> bool:
        """Whether keys are pooled."""
        return self.spec.subsample is not None

    @property
    def is_one_set(self) -> bool:
        """Whether every position meets every other."""
        return self.spec.axes == "all" and self.spec.group_size is None

    @property
    def is_differentiable(self) -> bool:
        """Whether the reference has gradients: a function of the user's has none."""
        return isinstance(self.spec.pairwise, str)

    @property
    def is_plain(self) -> bool:
        """Whether it is a named form in evaluation, with no pooling, no mask and no sets, for data of a check's own."""
        special = self.is_pooled or self.mask or self.training or self.ties or not self.is_one_set
        return self.is_differentiable and not special

    @property
    def is_uneven(self) -> bool:
        """Whether devices cut it into pieces that are not equally large."""
        axis, devices = self.cut or (0, 1)
        return bool((self.batch, *self.spatial)[axis] % devices)

    @property
    def trains_norm(self) -> bool:
        """Whether a call moves running statistics."""
        return self.training and self.spec.norm == "batch"

    def data(self, dtype: str = "float64") -> Data:
        """Return the arrays of this case, the same on every call, rounded to `dtype`."""
        return self._data(self._seed, dtype)

    @functools.cached_property
    def _seed(self) -> int:
        """The seed of the data."""
        if self.seed is not None:
            return self.seed
        conditions: list[float] = []
        while len(conditions) < SEEDS:
            conditions.append(self._condition(len(conditions)))
            if conditions[-1] <= CONDITION:
                break
        return int(np.argmin(conditions))

    def _condition(self, seed: int) -> float:
        """Return by how much a norm magnifies a rounding; infinity where the operation gives nothing."""
        data, spec = self._data(seed, "float64"), self.spec
        if self.mask == "all" or not self.is_differentiable:
            return 0.0
        r = branch(data.x, data.params, spec, data.key_mask).reshape(data.x.shape)
        values = r.reshape(-1, spec.channels) if data.key_mask is None else r[data.key_mask]
        if not values.size:
            return 0.0
        if len(values) > 1 and (values == values[0]).all():
            return np.inf
        if spec.norm != "batch":
            return 0.0
        return float((np.abs(values).max(axis=0) / np.sqrt(values.var(axis=0) + spec.norm_epsilon)).max())

    def _data(self, seed: int, dtype: str) -> Data:
        """Return the arrays that a seed gives."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()) + seed)
        shape = (self.batch, *self.spatial, self.spec.channels)
        x = rng.normal(size=shape)
        params = {name: _parameter(name, size, rng) for name, size in param_shapes(self.spec).items()}
        dz = rng.normal(size=shape)
        if self.ties:
            x = np.maximum(_rounded(_repeated(x, rng)), 0.0)
            exact = [name for name in params if name.partition(".")[0] in {"theta", "phi", "g"}]
            params |= {name: _rounded(params[name]) for name in exact}
        mask = None
        if self.mask is not None:
            mask = rng.random(shape[:-1]) < 0.6  # noqa: PLR2004 - some, not most
            if self.mask == "all":
                mask[:] = False
            elif self.batch > 1:
                mask[-1] = False
        kind = dtype_named(dtype)
        return Data(x.astype(kind), {name: a.astype(kind) for name, a in params.items()}, dz.astype(kind), mask)


def _repeated(x: Array, rng: np.random.Generator) -> Array:
    """Return `x` with about half of its positions equal to the one before them, along each spatial axis."""
    for axis in range(1, x.ndim - 1):
        before = np.arange(x.shape[axis]) // 2 * 2
        x = np.where(rng.random(x.shape[:-1])[..., None] < 1 / 2, np.take(x, before, axis=axis), x)
    return x


def _rounded(a: Array) -> Array:
    """Return values that are few bits long, away from 0 by a sign."""
    return np.sign(a) * np.maximum(np.round(GRAINS * np.abs(a)), 1.0) / GRAINS


def dtype_named(name: str) -> Any:
    """Return a dtype by its name, bfloat16 too."""
    if name == "bfloat16":
        import ml_dtypes

        return ml_dtypes.bfloat16
    return np.dtype(name)


def _parameter(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    if name == "norm.variance":
        return rng.uniform(0.5, 2.0, shape)
    if name.endswith(".weight") and not name.startswith("norm."):
        return rng.normal(size=shape) / np.sqrt(shape[-1])
    sign = rng.choice([-1.0, 1.0], shape)
    return sign * rng.uniform(0.5, 1.5, shape)
