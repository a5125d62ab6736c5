"""How the operation is computed: which methods serve a form, and which of them "auto" takes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from nonlocal_core.arguments import Size, check_choice, dtype_name, known_sizes
from nonlocal_core.errors import fail_value

__all__ = [
    "AHEAD",
    "CHUNK",
    "FUSED",
    "LIMITS",
    "METHODS",
    "WIDE",
    "Plan",
    "check_method",
    "chunk_rows",
    "exact_method",
    "keys_first",
    "plan",
    "plan_call",
    "sends_products",
    "serves",
]

_EXACT = {
    "gaussian": "streamed",
    "embedded_gaussian": "streamed",
    "dot_product": "reassociated",
    "concatenation": "sorted",
}

METHODS = ("auto", "pairwise", *dict.fromkeys(_EXACT.values()))
"""What `method` may be: "pairwise" is the N x M matrix, the last three do without it, "auto" chooses."""

Pairwise = str | Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one call is computed.

    Args:
        method: one of `METHODS`, but "auto".
        rows: for "streamed", the number of queries in a chunk; None: the framework's fused attention, which has
            chunks of its own.
    """

    method: str
    rows: int | None = None


def exact_method(pairwise: Pairwise) -> str | None:
    """Return the method that computes a form without the matrix, None for a function."""
    return _EXACT[pairwise] if isinstance(pairwise, str) else None


def serves(method: str, pairwise: Pairwise) -> bool:
    """Return whether a method can compute a form."""
    return method in {"auto", "pairwise", exact_method(pairwise)}


def check_method(method: str, pairwise: Pairwise) -> None:
    """Check that `method` is the name of one that serves the form.

    Raises:
        TypeError: if it is no string.
        ValueError: if there is no such method, or it does not serve the form.

    Example:
        >>> check_method("sorted", "dot_product")
        Traceback (most recent call last):
        ValueError: `method` must be 'auto', 'pairwise' or 'reassociated' for the form 'dot_product'. Got 'sorted'.
    """
    check_choice("method", method, METHODS)
    if not serves(method, pairwise):
        exact = exact_method(pairwise)
        rule = "be 'auto' or 'pairwise' for a function"
        if exact is not None:
            rule = f"be 'auto', 'pairwise' or {exact!r} for the form {pairwise!r}"
        raise fail_value("method", rule, repr(method))


def keys_first(queries: Size, keys: Size, inner: Size, values: Size) -> bool:
    """Return whether theta (phi^T g) takes fewer multiplications than (theta phi^T) g; unknown sizes are large."""
    if queries is None or keys is None or inner is None or values is None:
        return True
    return inner * values * (queries + keys) <= queries * keys * (inner + values)


def sends_products(keys: Size, inner: Size, values: Size) -> bool:
    """Return whether devices send fewer numbers for the sum of their C' x D products than for their keys and values."""
    if keys is None or inner is None or values is None:
        return True
    return 2 * inner * values <= keys * (inner + values)


def plan(
    method: str,
    pairwise: Pairwise,
    *,
    backend: str,
    device: str,
    dtype: str,
    batch: Size,
    queries: Size,
    keys: Size,
    inner: Size,
    gradients: bool,
    has_fused: bool = True,
) -> Plan:
    """Decide how one call is computed.

    Args:
        method: what the user asked for.
        pairwise: the form.
        backend: "torch", "tensorflow" or "jax".
        device: "cpu" or "gpu".
        dtype: the dtype of the operands.
        batch: B, times the number of sets; None where a size is unknown or symbolic, here and below.
        queries: N of one set.
        keys: M of one set.
        inner: the larger of C' and the width of the values.
        gradients: whether a gradient may be asked for.
        has_fused: whether the framework's fused attention, where it is the fastest, takes the operands on this device.

    Returns:
        The plan: with every size known the one that was the fastest when it was measured, else one that holds
        no matrix.
    """
    exact = exact_method(pairwise)
    limits = LIMITS.get((backend, device), {})
    weights = None if batch is None or queries is None or keys is None else batch * queries * keys
    if method == "auto":
        limit = limits.get((exact, gradients), 0)
        if limit and has_fused and _is_up_to(AHEAD, backend, device, dtype, inner):
            limit = 0
        elif limit and device == "gpu" and inner is not None and inner > WIDTH:
            limit = WIDE
        method = "pairwise" if exact is None or (weights is not None and weights <= limit) else exact
    if method != "streamed" or (has_fused and _is_up_to(FUSED, backend, device, dtype, inner)):
        return Plan(method)
    return Plan(method, chunk_rows(device, batch, queries, keys))


def chunk_rows(device: str, batch: Size, queries: Size, keys: Size) -> int:
    """Return the number of queries in a chunk, with sizes as of `plan`."""
    if batch is None or keys is None:
        return 128
    rows = CHUNK[device] // max(1, batch * keys)
    return max(1, rows if queries is None else min(rows, queries // 8))


def plan_call(
    theta: Any,
    g: Any,
    pairwise: Pairwise,
    method: str,
    *,
    backend: str,
    device: str,
    gradients: bool,
    is_exported: bool = False,
    has_fused: bool = True,
) -> Plan:
    """Decide how one call is computed, from the shapes and the dtype of its arrays.

    Args:
        theta: `(B, N, C')`, of any library; sizes that are no ints are unknown.
        g: `(B, M, D)`.
        pairwise: the form.
        method: what the user asked for.
        backend: as for `plan`, and so are the following.
        device: "cpu" or "gpu".
        gradients: whether a gradient may be asked for.
        is_exported: whether the call is recorded for other sizes, with which no size here may be compared.
        has_fused: as for `plan`.

    Returns:
        The plan.
    """
    (batch, queries, inner), (keys, width) = known_sizes(theta.shape), known_sizes(g.shape[1:])
    if is_exported:
        batch = queries = keys = None
    return plan(
        method,
        pairwise,
        backend=backend,
        device=device,
        dtype=dtype_name(theta),
        batch=batch,
        queries=queries,
        keys=keys,
        inner=None if inner is None or width is None else max(inner, width),
        gradients=gradients,
        has_fused=has_fused,
    )


CHUNK = {"cpu": 2**20, "gpu": 2**26}
"""How many weights a chunk of queries holds at most, if an eighth of the queries has no fewer."""

LIMITS: dict[tuple[str, str], dict[tuple[str | None, bool], int]] = {
    ("torch", "cpu"): {
        ("streamed", False): 2**16,
        ("streamed", True): 2**20,
        ("sorted", False): 2**18,
        ("sorted", True): 2**18,
    },
    ("tensorflow", "cpu"): {
        ("streamed", False): 2**22,
        ("streamed", True): 2**22,
        ("sorted", False): 2**16,
        ("sorted", True): 2**16,
    },
    ("jax", "cpu"): {
        ("streamed", True): 2**20,
        ("sorted", False): 2**16,
        ("sorted", True): 2**14,
    },
    ("torch", "gpu"): {("streamed", False): 2**22, ("streamed", True): 2**22},
    ("tensorflow", "gpu"): {("streamed", False): 2**22, ("streamed", True): 2**22},
    ("jax", "gpu"): {("streamed", True): 2**22},
}
"""Up to how many weights the matrix is faster, by backend, method, and whether gradients may be asked for; 0 elsewhere.

`python benchmarks/thresholds.py` measures them and writes benchmarks/results/thresholds.json; differences of 3 % or
less between the two are taken for noise. The 2**20 of PyTorch is below the one found there (1,568 positions), because
on another processor (Intel Xeon) the two took the same at 1,024.

Those of a GPU were not measured: they are the largest on a CPU.
"""

WIDTH = 256
"""Up to which width a GPU has fused attention that is fast."""

WIDE = 2**26
"""Up to how many weights of wider operands a GPU takes the matrix instead of chunks of queries.

On one NVIDIA H200, by an earlier version, the matrix was the faster at 20 and 35 million weights 512 wide, in bfloat16
and float32, in PyTorch, JAX and TensorFlow. In TensorFlow it also was at 315 million, 256 wide; but that
matrix has 1.3 GB, and a training step holds three.
"""

FUSED: dict[tuple[str, str], dict[str, float]] = {
    ("torch", "cpu"): {"float64": math.inf, "float32": math.inf, "bfloat16": math.inf},
    ("torch", "gpu"): dict.fromkeys(("float32", "bfloat16", "float16"), WIDTH),
    ("jax", "gpu"): dict.fromkeys(("bfloat16", "float16"), WIDTH),
}
"""Up to which width the framework's fused attention is faster than chunks of queries, by backend and dtype.

On a GPU no kernel for half precision is wider than 256. In float32 the one of PyTorch took 29.9 ms at a width of 256
where chunks took 33.4, and 4.9 at 512 where they took 4.3 (H200, as above).
"""

AHEAD: dict[tuple[str, str], dict[str, float]] = {
    ("torch", "gpu"): {"float32": 128, "bfloat16": WIDTH, "float16": WIDTH},
    ("jax", "gpu"): {"bfloat16": WIDTH, "float16": WIDTH},
}
"""Up to which width it is ahead of the matrix as well, however few weights there are."""


def _is_up_to(
    widths: dict[tuple[str, str], dict[str, float]], backend: str, device: str, dtype: str, inner: Size
) -> bool:
    """Return whether operands are no wider than a table has for them; an unknown width is wide."""
    width = widths.get((backend, device), {}).get(dtype, 0)
    return (math.inf if inner is None else inner) <= width
