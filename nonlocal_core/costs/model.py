"""What a block costs by each method that computes its form, from sizes alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence

from nonlocal_core.arguments import check_bool, check_choice, check_int
from nonlocal_core.costs.steps import INDICES, WIDE, Step, backward, forward, gathered, gradient, shapes_of
from nonlocal_core.errors import fail_type, fail_value
from nonlocal_core.planning import exact_method
from nonlocal_core.spec import NonLocalSpec
from nonlocal_core.spec.calls import check_spec
from nonlocal_core.spec.cuts import check_pieces, inner_axis
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
        bytes_received: what one of several devices receives from the others.
    """

    flops: int
    bytes_moved: int
    peak_memory: int
    bytes_received: int = 0

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


def cost(
    spec: NonLocalSpec, shape: Sequence[int], dtype: str = "float32", training: bool = False, *, devices: int = 1
) -> Cost:
    """Return what a block costs by each method that computes its form, in all or for one of several devices.

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

    Several devices cut the positions along the first spatial axis, as evenly as its sizes allow, and the cost is that
    of the first, whose part is the largest. Devices receive the keys of a set that are on others: phi and g, for
    "gaussian" the pooled input and g, for "concatenation" one number for each key and g, or where that is less, for
    "reassociated", sums of the products of phi and g; nothing if no set is on two devices. Batch normalisation in
    training sums two numbers of each channel, and counts. An array of n numbers that P devices gather costs each
    n (P - 1) / P, one that they sum twice that; the backward pass costs the same again. The gradients of the
    parameters, which are summed once in a step whatever the devices cut, are left out.

    Scores, weights, and sums that meet them, are held in at least float32, indices in 8 bytes, all else in the
    dtype of the input.

    Args:
        spec: the block.
        shape: `(B, S1..Sk, C)`, that of the input, channels last whatever the layout of the backend.
        dtype: "float16", "bfloat16", "float32" or "float64", the dtype in which the block computes.
        training: whether the cost is that of a training step, forward and backward, or of the forward pass alone.
        devices: P, how many devices cut the positions.

    Returns:
        The number of parameters, and the costs by the name of the method: "pairwise", and "streamed",
        "reassociated" or "sorted", whichever computes the form.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if the shape does not fit the spec or the devices, or the dtype is unknown.

    Example:
        >>> spec = NonLocalSpec.preset("official", channels=1024)
        >>> found = cost(spec, (8, 4, 14, 14, 1024))
        >>> found.parameters
        2101760
        >>> {name: method.macs for name, method in found.methods.items()}
        {'pairwise': 9479651328, 'streamed': 9479651328}
        >>> {name: method.peak_memory for name, method in found.methods.items()}
        {'pairwise': 51380224, 'streamed': 51380224}
        >>> cost(spec, (8, 4, 14, 14, 1024), devices=4).methods["streamed"].bytes_received
        4816896
    """
    check_spec(spec)
    itemsize = DTYPES[check_choice("dtype", dtype, DTYPES)]
    sizes = _sizes(shape)
    training = check_bool("training", training)
    spec.check_input(sizes, dtype=dtype, training=training)

    devices = check_int("devices", devices, "be a positive int", least=1)

    parameters = {name: math.prod(size) for name, size in param_shapes(spec).items() if name not in STATISTICS}
    exact = exact_method(spec.pairwise)
    methods = ("pairwise",) if exact is None else ("pairwise", exact)
    found = {method: _by_method(spec, sizes, method, itemsize, devices, training) for method in methods}
    return Cost(sum(parameters.values()), found)


def _by_method(
    spec: NonLocalSpec, sizes: Sequence[int], method: str, itemsize: int, devices: int, training: bool
) -> MethodCost:
    """Return the cost by one method."""
    batch, first, *others, channels = sizes
    largest = -(-first // devices)
    pieces = [min(largest, max(0, first - number * largest)) for number in range(devices)]
    rank = len(sizes) - 2
    if devices > 1:
        check_pieces(spec, rank, 0, pieces)
    is_apart = devices > 1 and inner_axis(spec, rank, 0) is not None
    sets, every_key = spec.sets((largest, *others)), spec.sets((first, *others)).keys
    shared = gathered(spec, every_key, method) if is_apart else ()
    shapes = shapes_of(spec, sets, batch, shared, every_key)
    held = {name: math.prod(size) * _bytes(name, itemsize) for name, size in shapes.items()}
    branch = forward(spec, shapes, method, shared, cut=is_apart)
    summed = 2 * held["product"] if is_apart and not shared else 0
    if training and spec.norm == "batch" and devices > 1:
        summed += 2 * (2 * channels + 1) * max(itemsize, _WIDE_BYTES)
    received = (sum(held[name] for name in shared) + summed) * (devices - 1) // devices
    counted = _counted(spec, branch, held, training)
    return dataclasses.replace(counted, bytes_received=(1 + training) * received)


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
