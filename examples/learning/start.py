"""What the frameworks share: the networks, how they are trained, and the weights with which they begin."""

from __future__ import annotations

from typing import Any

import numpy as np

import nonlocal_core as nlc
from learning.task import CLASSES
from nonlocal_core.spec.parameters import STATISTICS

__all__ = ["CHANNELS", "MIDDLES", "MOMENTUM", "OUTPUTS", "RATE", "SPEC", "WIDTH", "initial"]

Array = np.ndarray[Any, Any]
Weights = dict[str, dict[str, Array]]

CHANNELS = 16

SPEC = nlc.NonLocalSpec(channels=CHANNELS, norm="batch")
"""The block as it is in the paper: the embedded Gaussian form, normalised at its end."""

MIDDLES = ("nothing", "convolution", "non-local block")
"""What stands between the two residual blocks of the network."""

RATE, MOMENTUM = 0.5, 0.9

OUTPUTS = CLASSES + 1
"""Is it the same digit twice, and is each of the digits there?"""

_BLOCK = sum(int(np.prod(shape)) for name, shape in nlc.param_shapes(SPEC).items() if name not in STATISTICS)

WIDTH = -(-(_BLOCK - 2 * CHANNELS) // (10 * CHANNELS + 2))
"""The inner channels of the convolution in the middle: the fewest that give it no fewer parameters than the block."""

_KERNELS = {
    "stem.conv": (4, 4, 1, CHANNELS),
    "before.first.conv": (3, 3, CHANNELS, CHANNELS),
    "before.second.conv": (1, 1, CHANNELS, CHANNELS),
    "after.first.conv": (3, 3, CHANNELS, CHANNELS),
    "after.second.conv": (1, 1, CHANNELS, CHANNELS),
    "head": (CHANNELS, OUTPUTS),
}


def initial(middle: str, seed: int) -> Weights:
    """Return the weights with which a network begins: those of each layer by the name of the layer.

    The last factor of what stands in the middle is 0, so that the three networks of a seed begin as one function.
    Norms that are not named begin with scale 1 and bias 0, the head with bias 0, as in every framework.

    Args:
        middle: one of `MIDDLES`.
        seed: the seed of the random weights.

    Returns:
        The kernels (height, width, in, out) of the layers of a framework, and the canonical parameters of the block
        as `middle`.
    """
    rng = np.random.default_rng(seed)
    weights = {name: {"kernel": _kernel(shape, rng)} for name, shape in _KERNELS.items()}
    weights["head"]["bias"] = np.zeros(OUTPUTS)
    if middle == "convolution":
        weights["middle.first.conv"] = {"kernel": _kernel((3, 3, CHANNELS, WIDTH), rng)}
        weights["middle.second.conv"] = {"kernel": _kernel((1, 1, WIDTH, CHANNELS), rng)}
        weights["middle.second.norm"] = {"scale": np.zeros(CHANNELS)}
    elif middle == "non-local block":
        # The deviation of 0.01 is for a block that enters a trained network; here it is that of 16 channels, 0.25.
        params = nlc.init_params(SPEC, rng)
        weights["middle"] = {name: value * (25 if value.ndim > 1 else 1) for name, value in params.items()}
    return weights


def _kernel(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Return the kernel of a layer before a ReLU, as He et al. draw it."""
    return rng.normal(scale=(2 / np.prod(shape[:-1])) ** 0.5, size=shape)
