"""A network in Flax NNX."""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nonlocal_conformance.driver import Array, Params
from nonlocal_core import AttentionMap
from nonlocal_core.networks.insertion import Insertion
from nonlocal_jax import attention_of, check_identity, insert_nonlocal, remove_nonlocal

__all__ = ["JaxNetwork"]


class JaxNetwork:
    """Linear layers in turn; `scope` gives what it is made and run in, for arrays of a dtype."""

    def __init__(self, layers: Params, scope: Callable[..., AbstractContextManager[None]]) -> None:
        """Take the matrices by the names of their layers."""
        self.example = next(iter(layers.values()))
        self.scope = scope
        with scope(self.example):
            self.model = _Chain(layers)

    def run(self, x: Array, *, training: bool = False) -> Array:
        """Return the output."""
        self.model.set_attributes(use_running_average=not training, raise_if_not_found=False)
        with self.scope(x):
            return np.array(self.model(jnp.asarray(x)))

    def state(self) -> Params:
        """Return the state by its paths."""
        flat = nnx.to_flat_state(nnx.state(self.model))
        return {".".join(map(str, path)): np.array(variable[...]) for path, variable in flat}

    def insert(self, after: Any, x: Array, **options: Any) -> list[Insertion]:
        """Put blocks in, in place."""
        with self.scope(x):
            return insert_nonlocal(
                self.model, after, rngs=nnx.Rngs(0), example_input=x, param_dtype=self.example.dtype, **options
            )

    def remove(self) -> None:
        """Take the blocks out, in place."""
        remove_nonlocal(self.model)

    def load(self, block: str, params: Params) -> None:
        """Let a block take parameters in."""
        with self.scope(self.example):
            operator.attrgetter(block)(self.model).import_params(params)

    def check_identity(self) -> None:
        """Check that every block is the identity."""
        check_identity(self.model)

    def attention_of(self, x: Array, block: str | None = None, positions: Any = None) -> AttentionMap:
        """Return rows of the weights of a block."""
        with self.scope(x):
            return attention_of(self.model, jnp.asarray(x), block, positions)


class _Chain(nnx.Module):
    def __init__(self, layers: Params) -> None:
        self.names = tuple(layers)
        for name, weight in layers.items():
            options: dict[str, Any] = {"use_bias": False, "param_dtype": weight.dtype, "rngs": nnx.Rngs(0)}
            layer = nnx.Linear(*weight.T.shape, kernel_init=lambda *_, kernel=weight.T: jnp.asarray(kernel), **options)
            setattr(self, name, layer)

    def __call__(self, x: jax.Array) -> jax.Array:
        return reduce(lambda x, name: getattr(self, name)(x), self.names, x)
