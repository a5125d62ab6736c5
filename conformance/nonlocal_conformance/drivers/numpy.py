"""The driver of the reference itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import numpy as np

import nonlocal_core as nlc
from nonlocal_conformance.capabilities import BACKENDS
from nonlocal_conformance.driver import Array, Everything, Mask, Params, Session, Spec
from nonlocal_conformance.memory import peak_resident
from nonlocal_core import NonLocalSpec
from nonlocal_core.planning import METHODS
from nonlocal_core.spec.parameters import STATISTICS, check_params

__all__ = ["NumpyDriver"]

T = TypeVar("T")


class NumpyDriver:
    """The reference in NumPy; it computes in float64 whatever the dtype of the input."""

    name = "numpy"
    version = np.__version__
    dtypes = ("float64", "float32")
    methods = METHODS
    capabilities = BACKENDS["numpy"]
    is_reference = True

    def __init__(self, device: str = "cpu", *, unbiased: bool = False) -> None:
        """Take the device, which can only be the CPU, and the kind of variance that is kept running."""
        if device != "cpu":
            message = f"`device` must be 'cpu' for the backend 'numpy'. Got {device!r}."
            raise ValueError(message)
        self.device, self.unbiased = device, unbiased

    def block(
        self,
        spec: Spec,
        params: Params,
        x: Array,
        key_mask: Mask = None,
        *,
        training: bool = False,
        method: str = "auto",
    ) -> tuple[Array, Params]:
        """Return the output of a block and its running statistics after the call."""
        z = nlc.nonlocal_block(x, params, spec, key_mask, training, method=method)
        if spec.norm != "batch":
            return z, {}
        if training:
            return z, nlc.updated_statistics(x, params, spec, key_mask, unbiased=self.unbiased)
        return z, {name: params[name] for name in STATISTICS}

    def steps(
        self, spec: Spec, params: Params, inputs: Sequence[Array], *, training: bool = False
    ) -> list[tuple[Array, Params]]:
        """Call one block on each input in turn."""
        results = []
        for x in inputs:
            z, statistics = self.block(spec, params, x, training=training)
            params = {**params, **statistics}
            results.append((z, statistics))
        return results

    def vjp(
        self,
        spec: Spec,
        params: Params,
        x: Array,
        dz: Array,
        key_mask: Mask = None,
        *,
        training: bool = False,
        method: str = "auto",
    ) -> tuple[Array, Params]:
        """Return the gradients of the input and of the parameters."""
        return nlc.nonlocal_block_vjp(x, params, spec, dz, key_mask, training, method=method)

    def session(self, spec: Spec, params: Params, *, method: str = "auto") -> Session:
        """Return the functions of the reference with the parameters that they are called with in turn."""
        return _Session(self, spec, params, method)

    def train(
        self, spec: Spec, params: Params, x: Array, target: Array, key_mask: Mask = None, *, steps: int, rate: float
    ) -> tuple[list[float], Params]:
        """Return the losses, mean squares of z - target, and the parameters of plain SGD in training mode."""
        losses = []
        for _ in range(steps):
            z, statistics = self.block(spec, params, x, key_mask, training=True)
            losses.append(float(np.mean((z - target) ** 2)))
            dz = (2 / z.size) * (z - target)
            _, gradients = self.vjp(spec, params, x, dz, key_mask, training=True)
            params = {name: a - rate * gradients[name] if name in gradients else a for name, a in params.items()}
            params |= statistics
        return losses, params

    def op(self, theta: Array, phi: Array, g: Array, **options: Any) -> Array:
        """Return the operation alone."""
        return nlc.nonlocal_op(theta, phi, g, **options)

    def op_vjp(self, theta: Array, phi: Array, g: Array, dy: Array, **options: Any) -> Params:
        """Return the gradients of the operation alone."""
        return nlc.nonlocal_op_vjp(theta, phi, g, dy, **options)

    def attention(self, spec: Spec, params: Params, x: Array, positions: Any = None, key_mask: Mask = None) -> Array:
        """Return rows of the weights."""
        return nlc.attention(x, params, spec, positions, key_mask)

    def export(self, spec: Spec, params: Params) -> Params:
        """Take parameters in and give them out again."""
        check_params(params, spec)
        return {name: array.copy() for name, array in params.items()}

    def create(self, **options: Any) -> Spec:
        """Return the spec with these options."""
        return NonLocalSpec(**options)

    def rebuilt(self, spec: Spec) -> Spec:
        """Return the spec as its JSON text gives it back."""
        return NonLocalSpec.from_json(spec.to_json())

    def initial(self, spec: Spec, seed: int = 0) -> Params:
        """Return the parameters of a new block."""
        return nlc.init_params(spec, np.random.default_rng(seed))

    def peak_memory(self, call: Callable[[], T]) -> tuple[T, int | None]:
        """Return the result of a call and its peak extra memory in bytes."""
        return peak_resident(call)


class _Session:
    """The functions of the reference with the parameters that they are called with in turn."""

    def __init__(self, driver: NumpyDriver, spec: Spec, params: Params, method: str) -> None:
        self._driver, self._spec, self._method = driver, spec, method
        self._frozen = frozenset[str]()
        self.load(params)

    def call(self, x: Array, key_mask: Mask = None, *, training: bool = False) -> tuple[Array, Params]:
        """Return z and the statistics, which are kept."""
        arguments = (self._spec, self._params, x, key_mask)
        z, statistics = self._driver.block(*arguments, training=training, method=self._method)
        self._params |= {name: a.copy() for name, a in statistics.items()}
        return z, statistics

    def gradients(self, x: Array, dz: Array, key_mask: Mask = None, *, training: bool = False) -> Everything:
        """Return the gradients of what is not frozen."""
        arguments = (self._spec, self._params, x, dz, key_mask)
        dx, dparams = self._driver.vjp(*arguments, training=training, method=self._method)
        return (
            *self.call(x, key_mask, training=training),
            dx,
            {name: d for name, d in dparams.items() if name not in self._frozen},
        )

    def load(self, params: Params) -> None:
        """Take parameters in."""
        self._params = self._driver.export(self._spec, params)

    def params(self) -> Params:
        """Return the parameters."""
        return self._driver.export(self._spec, self._params)

    def freeze(self, names: Collection[str]) -> None:
        """Leave these parameters out of the gradients."""
        self._frozen = frozenset(names)

    def copies(self) -> dict[str, Session]:
        """Return a copy."""
        return {"deepcopy": copy.deepcopy(self)}
