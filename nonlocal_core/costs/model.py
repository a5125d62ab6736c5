"""What a block costs by each method that computes its form, from sizes alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence

from nonlocal_core.arguments import check_bool, check_choice, check_int
from nonlocal_core.costs.steps import INDICES, WIDE, Step, backward, forward, gradient, shapes_of
from nonlocal_core.errors import fail_type, fail_value
from nonlocal_core.planning import exact_method
from nonlocal_core.spec import NonLocalSpec
from nonlocal_core.spec.calls import check_spec
from nonlocal_core.spec.parameters import STATISTICS, param_shapes

__all__ = ["DIMENSIONS", "DTYPES", "Cost", "MethodCost", "cost"]

DTYPES: Mapping[str, int] = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
"""The bytes of one number of each dtype that is known."""

DIMENSIONS = range(3, 6)
"""How many axes an input may have: batch, 1 to 3 spatial axes, and channels."""

_WIDE_BYTES = DTYPES["float32"]
_INDEX_BYTES = 8


@dataclasses.dataclass(frozen=True)
class MethodCost:
    """What one method costs.

    Args:
        flops: floating-point operations in products, 2 for each multiply-add.
        bytes_moved: bytes read and written.
        peak_memory: the most bytes held at once beside the input, the parameters and the output; in training
            beside their gradients too.
    """

    flops: int
    bytes_moved: int
    peak_memory: int

    @property
    def macs(self) -> int:
        """The number of multiply-adds."""
        return self.flops // 2


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a block costs.

    Args:
        parameters: the number of trained parameters: with the scale and shift of a norm, without running
            statistics.
        methods: the cost by each method that computes the form, by its name.
    """

    parameters: int
    methods: Mapping[str, MethodCost]


def cost(spec: NonLocalSpec, shape: Sequence[int], dtype: str = "float32", training: bool = False) -> Cost:
    """Return what a block costs by each method that computes its form.

    A block is a row of steps: pooling, the projections (one product for those with the same input), the steps of
    the method, W_z, the norm, and the sum with the input.

    - FLOPs are those of the products: of the projections, of theta and phi, with w_f, with g and with W_z; for
      "sorted" also a multiply-add for each entry of the prefix sums and of y. Pooling, softmax, sorting, norms,
      biases, sums of arrays and what a `pairwise` function does are not counted. In training each product has
      two more, for the gradients of both its operands, that of the input among them; "streamed" computes the
      scores once more. What a backend saves by joining w_f with W_theta and W_phi is not taken off.
    - Bytes moved: each step reads each of its operands and writes each of its results once, and so do the steps
      of the gradients. A fused or blocked kernel is one step.
    - Peak memory: a result is held from its step to the last one that reads it; in training a step of the
      gradients may be that. Work space, copies for a change of layout or dtype and the sum of partial gradients
      are not counted.

    Scores, weights, and sums that meet them, are held in at least float32, indices in 8 bytes, all else in the
    dtype of the input.

    Args:
        spec: the block.
        shape: `(B, S1..Sk, C)`, that of the input, channels last whatever the layout of the backend.
        dtype: "float16", "bfloat16", "float32" or "float64", the dtype in which the block computes.
        training: whether the cost is that of a training step, forward and backward, or of the forward pass alone.

    Returns:
        The number of parameters, and the costs by the name of the method: "pairwise", and "streamed",
        "reassociated" or "sorted", whichever computes the form.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if the shape does not fit the spec, or the dtype is unknown.

    Example:
        >>> spec = NonLocalSpec.preset("official", channels=1024)
        >>> found = cost(spec, (8, 4, 14, 14, 1024))
        >>> found.parameters
        2101760
        >>> {name: method.macs for name, method in found.methods.items()}
        {'pairwise': 9479651328, 'streamed': 9479651328}
        >>> {name: method.peak_memory for name, method in found.methods.items()}
        {'pairwise': 51380224, 'streamed': 51380224}
    """
    check_spec(spec)
    itemsize = DTYPES[check_choice("dtype", dtype, DTYPES)]
    sizes = _sizes(shape)
    training = check_bool("training", training)
    spec.check_input(sizes, dtype=dtype, training=training)

    parameters = {name: math.prod(size) for name, size in param_shapes(spec).items() if name not in STATISTICS}
    shapes = shapes_of(spec, spec.sets(sizes[1:-1]), sizes[0])
    held = {name: math.prod(size) * _bytes(name, itemsize) for name, size in shapes.items()}
    exact = exact_method(spec.pairwise)
    methods = ("pairwise",) if exact is None else ("pairwise", exact)
    return Cost(
        sum(parameters.values()),
        {method: _counted(spec, forward(spec, shapes, method), held, training) for method in methods},
    )


def _sizes(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the sizes of a shape that may be one of an input."""
    rule = "be (B, S1..Sk, C): 3, 4 or 5 positive ints"
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        raise fail_type("shape", rule, shape)
    if len(shape) not in DIMENSIONS:
        raise fail_value("shape", rule, tuple(shape))
    return tuple(check_int("shape", size, rule) for size in shape)


def _bytes(name: str, itemsize: int) -> int:
    """Return the bytes of one number of what bears a name."""
    if name in INDICES:
        return _INDEX_BYTES
    return max(itemsize, _WIDE_BYTES) if name in WIDE else itemsize


def _counted(spec: NonLocalSpec, branch: Sequence[Step], held: Mapping[str, int], training: bool) -> MethodCost:
    """Return the cost of a block whose branch consists of these steps."""
    total = [Step(("z",), ("x", "branch"))] if spec.residual else []
    steps = [*branch, *total, *(backward(branch) if training else ())]
    sizes = {**held, **{gradient(name): size for name, size in held.items()}}
    moved = sum(sizes[name] for step in steps for name in {*step.operands, *step.results})
    # The gradient of "branch" is that of "z" itself.
    given = {"x", "z", *param_shapes(spec)}
    given |= {gradient(name) for name in (*given, "branch")}
    return MethodCost(sum(step.flops for step in steps), moved, _peak(steps, sizes, given))


def _peak(steps: Sequence[Step], sizes: Mapping[str, int], given: Collection[str]) -> int:
    """Return the most bytes that are held during any step, beside what is given."""
    last = {name: index for index, step in enumerate(steps) for name in (*step.operands, *step.results)}
    live: set[str] = set()
    peak = 0
    for index, step in enumerate(steps):
        live |= {name for name in step.results if name not in given}
        peak = max(peak, sum(sizes[name] for name in live))
        live = {name for name in live if last[name] > index}
    return peak
