"""The passes over memory of which a block consists, by each method, and those of its gradients: shapes alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence

from nonlocal_core.geometry import Sets
from nonlocal_core.planning import keys_first, sends_products
from nonlocal_core.spec import NonLocalSpec
from nonlocal_core.spec.parameters import STATISTICS, param_shapes

__all__ = ["INDICES", "WIDE", "Step", "backward", "forward", "gathered", "gradient", "shapes_of"]

Shapes = Mapping[str, tuple[int, ...]]

INDICES = ("order", "rank")
"""What is held as integers: the order of the sorted keys, and how many of them count for each query."""

WIDE = ("a", "b", "own b", "scores", "weights", "normalizer", "product", "sums", "rows")
"""What is held in at least float32, whatever the dtype of the input."""

_CONSTANT = {*INDICES, *STATISTICS, "normalizer"}
"""What has no gradient."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One pass over memory: every operand is read once and every result is written once.

    Args:
        results: the names of what is written.
        operands: the names of what is read.
        flops: 2 for each multiply-add.
        kept: what the gradients read beside those of the results. None: the step is a product of its first
            operand with the others.
        backward_flops: those of the gradients, unless the step is a product.
    """

    results: tuple[str, ...]
    operands: tuple[str, ...]
    flops: int = 0
    kept: tuple[str, ...] | None = None
    backward_flops: int = 0


def gradient(name: str) -> str:
    """Return the name of the gradient with respect to `name`."""
    return f"d {name}"


def gathered(spec: NonLocalSpec, keys: int, method: str) -> tuple[str, ...]:
    """Return what devices gather where so many keys of one set are apart; nothing if they sum products instead."""
    inner = spec.inner_channels
    if spec.pairwise == "dot_product" and method != "pairwise" and sends_products(keys, inner, inner):
        return ()
    return ({"gaussian": "pooled x", "concatenation": "b"}.get(str(spec.pairwise), "phi"), "g")


def shapes_of(
    spec: NonLocalSpec, sets: Sets, batch: int, shared: Collection[str], every_key: int
) -> dict[str, tuple[int, ...]]:
    """Return the shape of everything that a step of any method reads or writes.

    Args:
        spec: the block.
        sets: the positions of one device.
        batch: how many samples.
        shared: what it gathers from all devices; what it has of that by itself is its "own".
        every_key: how many keys a set has on all devices.
    """
    outer, inner = spec.channels, spec.inner_channels
    score = inner if spec.has_embedding else outer
    queries, own = (batch * sets.count, sets.queries), (batch * sets.count, sets.keys)
    keys = (own[0], every_key) if shared else own
    widths = {"pooled x": outer, "phi": inner, "g": inner, "b": 1}
    return param_shapes(spec) | {
        "x": (*queries, outer),
        "theta": (*queries, inner),
        "unpooled phi": (*queries, inner),
        "unpooled g": (*queries, inner),
        **{name: (*(keys if name in shared else own), width) for name, width in widths.items()},
        **{f"own {name}": (*own, width) for name, width in widths.items()},
        "scores": (*queries, keys[1]),
        "weights": (*queries, keys[1]),
        "normalizer": (*queries, 1),
        "product": (queries[0], score, inner),
        "a": (*queries, 1),
        "order": (*keys, 1),
        "rank": (*queries, 1),
        "sums": (*keys, 2 * inner),
        "rows": (*queries, 2 * inner),
        "y": (*queries, inner),
        "out": (*queries, outer),
        "branch": (*queries, outer),
        "z": (*queries, outer),
    }


def forward(spec: NonLocalSpec, shapes: Shapes, method: str, shared: Collection[str], *, cut: bool) -> list[Step]:
    """Return the steps from "x" to "branch", which is what the block adds to it, or to "z" if it adds nothing."""
    pooled = shapes["own g"] != shapes["unpooled g"]
    theta, phi = "theta", "phi"
    if not spec.has_embedding:
        theta, phi = "x", "pooled x" if pooled or shared else "x"
    return [
        *_projections(spec, shapes, shared, pooled=pooled),
        *_operation(spec, shapes, method, theta, phi, shared, cut=cut),
        *_output(spec, shapes),
    ]


def backward(steps: Sequence[Step]) -> list[Step]:
    """Return the steps from the gradient of the last result to those of the input and of the parameters."""
    known = {gradient(steps[-1].results[0])}
    passes: list[Step] = []
    for step in reversed(steps):
        given = tuple(name for name in map(gradient, step.results) if name in known)
        if given:
            passes += _pullback(step, given)
            known |= {gradient(name) for name in step.operands if name not in _CONSTANT}
    return passes


def _pullback(step: Step, given: tuple[str, ...]) -> Iterator[Step]:
    """Yield the gradients of the operands of one step."""
    if step.kept is None:
        first, *others = step.operands
        yield Step((gradient(first),), (*given, *others), step.flops)
        yield Step(tuple(map(gradient, others)), (*given, first), step.flops)
    else:
        wanted = tuple(gradient(name) for name in step.operands if name not in _CONSTANT)
        yield Step(wanted, (*given, *step.kept), step.backward_flops)


def _own(name: str, shared: Collection[str]) -> str:
    """Return what a device makes by itself of something."""
    return f"own {name}" if name in shared else name


def _projections(spec: NonLocalSpec, shapes: Shapes, shared: Collection[str], *, pooled: bool) -> Iterator[Step]:
    """Yield theta, phi and g; layers that share their input are one product."""
    at_input = pooled and spec.subsample_at == "input"
    at_projection = pooled and not at_input
    own = {name: _own(name, shared) for name in ("pooled x", "phi", "g")}
    source, made = own["pooled x"] if at_input else "x", dict(own)
    if at_projection:
        made = {layer: f"unpooled {layer}" for layer in own}
    named = {"theta": ("x", "theta"), "phi": (source, made["phi"]), "g": (source, made["g"])}
    present = [layer for layer in named if layer in spec.layers]

    if at_input or (pooled and not spec.has_embedding):
        yield _pool(own["pooled x"], "x")
    for operand in dict.fromkeys(named[layer][0] for layer in present):
        layers = [layer for layer in present if named[layer][0] == operand]
        results = tuple(named[layer][1] for layer in layers)
        yield _product(shapes, results, operand, *_parameters(spec, *layers))
    if at_projection:
        yield from (_pool(own[layer], named[layer][1]) for layer in present if layer != "theta")


def _operation(
    spec: NonLocalSpec, shapes: Shapes, method: str, theta: str, phi: str, shared: Collection[str], *, cut: bool
) -> Iterator[Step]:
    """Yield the steps from theta, phi and g to "y"."""
    _, queries, score = shapes[theta]
    _, keys, inner = shapes["g"]
    if spec.pairwise == "concatenation":
        weight = _parameters(spec, "concat")
        yield _product(shapes, ("a",), theta, *weight)
        yield _product(shapes, (_own("b", shared),), phi, *weight)
    for name in shared:
        is_input = name == "pooled x" and shapes[f"own {name}"] == shapes["x"]
        yield Step((name,), ("x" if is_input else f"own {name}",), kept=())
    if method == "streamed":
        # The scores and the sums; for the gradients the scores again, and two products for each of both.
        pairs, kept = 2 * math.prod(shapes["scores"]), (theta, phi, "g", "y", "normalizer")
        flops, backward_flops = pairs * (score + inner), pairs * (3 * score + 2 * inner)
        yield Step(("y", "normalizer"), (theta, phi, "g"), flops, kept, backward_flops)
    elif method == "sorted":
        yield from _sorted(shapes)
    elif method == "reassociated" and ((cut and not shared) or keys_first(queries, keys, score, inner)):
        yield _product(shapes, ("product",), phi, "g")
        yield _product(shapes, ("y",), theta, "product")
    elif method == "reassociated":
        yield _product(shapes, ("scores",), theta, phi)
        yield _product(shapes, ("y",), "scores", "g")
    else:
        yield _scores(spec, shapes, theta, phi)
        yield Step(("weights",), ("scores",), kept=("weights",) if spec.is_softmax else ())
        yield _product(shapes, ("y",), "weights", "g")


def _scores(spec: NonLocalSpec, shapes: Shapes, theta: str, phi: str) -> Step:
    """Return the step to the matrix of scores."""
    if spec.pairwise == "concatenation":
        return Step(("scores",), ("a", "b"), kept=("scores",))
    if isinstance(spec.pairwise, str):
        return _product(shapes, ("scores",), theta, phi)
    return Step(("scores",), (theta, phi), kept=(theta, phi, "scores"))


def _sorted(shapes: Shapes) -> Iterator[Step]:
    """Yield the steps from a_i, b_j and g to "y": a multiply-add for each entry of the prefix sums and of y."""
    sums, y = 2 * math.prod(shapes["sums"]), 2 * math.prod(shapes["y"])
    yield Step(("order",), ("b",), kept=())
    yield Step(("rank",), ("a", "b"), kept=())
    yield Step(("sums",), ("g", "b", "order"), sums, ("g", "b", "order"), 2 * sums)
    yield Step(("rows",), ("sums", "rank"), kept=("rank",))
    yield Step(("y",), ("a", "rows"), y, ("a", "rows"), 2 * y)


def _output(spec: NonLocalSpec, shapes: Shapes) -> Iterator[Step]:
    """Yield the steps from "y" to the last result."""
    last = "branch" if spec.residual else "z"
    yield _product(shapes, (last if spec.norm is None else "out",), "y", *_parameters(spec, "out"))
    if spec.norm is not None:
        yield Step((last,), ("out", *_parameters(spec, "norm")), kept=("out", "norm.weight"))


def _product(shapes: Shapes, results: tuple[str, ...], first: str, *others: str) -> Step:
    flops = 2 * math.prod(shapes[first]) * sum(shapes[result][-1] for result in results)
    return Step(results, (first, *others), flops)


def _pool(result: str, source: str) -> Step:
    """Return the pooling; its gradient looks at what was pooled."""
    return Step((result,), (source,), kept=(source,))


def _parameters(spec: NonLocalSpec, *layers: str) -> tuple[str, ...]:
    return tuple(name for name in param_shapes(spec) if name.partition(".")[0] in layers)
