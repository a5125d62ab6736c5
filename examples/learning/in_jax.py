"""The networks in JAX."""

from __future__ import annotations

from functools import reduce
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from learning.start import CHANNELS, MOMENTUM, OUTPUTS, RATE, SPEC, WIDTH, initial
from nonlocal_jax import NonLocalBlock

Array = np.ndarray[Any, Any]

SGD = optax.sgd(RATE, MOMENTUM)
"""One for all, or each network would be compiled again."""


class Normed(nnx.Module):
    """A convolution and the normalisation of its output."""

    def __init__(self, entering: int, leaving: int, side: int, rngs: nnx.Rngs, **options: Any) -> None:
        self.conv = nnx.Conv(entering, leaving, (side, side), use_bias=False, rngs=rngs, **options)
        # The fast variance loses digits.
        self.norm = nnx.BatchNorm(leaving, momentum=0.9, use_fast_variance=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.conv(x))


class Residual(nnx.Module):
    """x + a convolution of a convolution."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.first, self.second = Normed(CHANNELS, width, 3, rngs), Normed(width, CHANNELS, 1, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.second(nnx.relu(self.first(x)))


class Network(nnx.Module):
    """Which digits are on a canvas, and is it the same twice?"""

    def __init__(self, middle: str) -> None:
        rngs = nnx.Rngs(0)
        self.stem = Normed(1, CHANNELS, 4, rngs, strides=2, padding="VALID")
        self.before, self.after = Residual(CHANNELS, rngs), Residual(CHANNELS, rngs)
        if middle == "nothing":
            self.middle = nnx.identity
        elif middle == "convolution":
            self.middle = Residual(WIDTH, rngs)
        else:
            self.middle = NonLocalBlock.from_spec(SPEC, rngs=rngs)
        self.head = nnx.Linear(CHANNELS, OUTPUTS, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.before(nnx.relu(self.stem(x))))
        x = nnx.relu(self.after(self.middle(x)))
        return self.head(x.mean((1, 2)))


class Learner:
    """A network that learns."""

    def __init__(self, middle: str, seed: int) -> None:
        self.network = Network(middle)
        for name, values in initial(middle, seed).items():
            layer = reduce(getattr, name.split("."), self.network)
            if isinstance(layer, NonLocalBlock):
                layer.import_params(values)
            else:
                for kind, value in values.items():
                    getattr(layer, kind)[...] = value
        self.optimizer = nnx.Optimizer(self.network, SGD, wrt=nnx.Param)

    def step(self, canvases: Array, labels: Array) -> float:
        """Learn from one batch and return its loss."""
        return float(_step(self.network, self.optimizer, canvases, labels))

    def logits(self, canvases: Array) -> Array:
        """Return the scores of the answers, above 0 for yes."""
        return np.asarray(_logits(self.network, canvases))


def _loss(network: Network, canvases: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.sigmoid_binary_cross_entropy(network(canvases), labels).mean()


@nnx.jit
def _step(network: Network, optimizer: nnx.Optimizer, canvases: jax.Array, labels: jax.Array) -> jax.Array:
    loss, gradients = nnx.value_and_grad(_loss)(network, canvases, labels)
    optimizer.update(network, gradients)
    return loss


@nnx.jit
def _logits(network: Network, canvases: jax.Array) -> jax.Array:
    return nnx.view(network, use_running_average=True)(canvases)
