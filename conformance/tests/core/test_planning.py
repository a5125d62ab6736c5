"""The planner: what serves a form, and what "auto" takes."""

import itertools

import pytest

from nonlocal_core import planning
from nonlocal_core.planning import Plan, check_method, exact_method, keys_first, plan, serves

FORMS = {
    "gaussian": "streamed",
    "embedded_gaussian": "streamed",
    "dot_product": "reassociated",
    "concatenation": "sorted",
}
BACKENDS = ("torch", "tensorflow", "jax")
SIZES = {"batch": 2, "queries": 4096, "keys": 1024, "inner": 64}


def planned(method="auto", pairwise="embedded_gaussian", **changes):
    known = {"backend": "jax", "device": "cpu", "dtype": "float32", "gradients": True, **SIZES}
    return plan(method, pairwise, **{**known, **changes})


@pytest.mark.parametrize("method", planning.METHODS)
@pytest.mark.parametrize("pairwise", FORMS)
def test_a_form_is_served_by_the_matrix_and_one_method_without_it(pairwise, method):
    assert serves(method, pairwise) == (method in {"auto", "pairwise", FORMS[pairwise]})


@pytest.mark.parametrize(("method", "served"), [("auto", True), ("pairwise", True), ("sorted", False)])
def test_a_function_is_served_by_the_matrix_alone(method, served):
    assert serves(method, max) == served
    assert exact_method(max) is None


def test_an_unknown_method_is_refused_with_the_names_that_there_are():
    names = "'auto', 'pairwise', 'streamed', 'reassociated', 'sorted'"
    with pytest.raises(ValueError, match=f"`method` must be one of {names}. Got 'fast'"):
        check_method("fast", "gaussian")
    with pytest.raises(TypeError, match="`method` must be one of"):
        check_method(3, "gaussian")


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pairwise", FORMS)
def test_many_positions_are_computed_without_the_matrix(pairwise, backend, device):
    chosen = planned(pairwise=pairwise, backend=backend, device=device, queries=2**16, keys=2**16)
    assert chosen.method == FORMS[pairwise]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pairwise", FORMS)
@pytest.mark.parametrize("unknown", ["batch", "queries", "keys"])
def test_an_unknown_size_is_taken_for_a_large_one(pairwise, backend, unknown):
    chosen = planned(pairwise=pairwise, backend=backend, **{unknown: None})
    assert chosen.method == FORMS[pairwise]
    assert chosen.rows is None or chosen.rows > 0


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("pairwise", FORMS)
def test_the_matrix_is_taken_up_to_its_limit(pairwise, gradients, monkeypatch):
    limits = {(method, when): 0 for method in FORMS.values() for when in (False, True)}
    limits[FORMS[pairwise], gradients] = 2 * 30 * 40
    monkeypatch.setitem(planning.LIMITS, ("jax", "cpu"), limits)
    assert planned(pairwise=pairwise, queries=30, keys=40, gradients=gradients) == Plan("pairwise")
    assert planned(pairwise=pairwise, queries=30, keys=41, gradients=gradients).method == FORMS[pairwise]
    assert planned(pairwise=pairwise, queries=30, keys=40, gradients=not gradients).method == FORMS[pairwise]


@pytest.mark.parametrize(("pairwise", "method"), [*FORMS.items(), ("concatenation", "pairwise"), (max, "pairwise")])
def test_a_method_that_was_asked_for_is_taken(pairwise, method):
    assert planned(method, pairwise, queries=2, keys=2).method == method


def test_a_function_is_computed_by_the_matrix():
    assert planned(pairwise=max) == Plan("pairwise")


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "inner", "fused"),
    [
        ("torch", "cpu", "float32", 512, True),
        ("torch", "cpu", "float64", 64, True),
        ("torch", "gpu", "bfloat16", 256, True),
        ("torch", "gpu", "bfloat16", 512, False),
        ("torch", "gpu", "float32", 256, True),
        ("torch", "gpu", "float32", 257, False),
        ("torch", "gpu", "float64", 64, False),
        ("torch", "gpu", "bfloat16", None, False),
        ("torch", "cpu", "float32", None, True),
        ("torch", "cpu", "float16", 64, False),
        ("tensorflow", "cpu", "float32", 64, False),
        ("tensorflow", "gpu", "bfloat16", 64, False),
        ("jax", "cpu", "bfloat16", 64, False),
        ("jax", "gpu", "bfloat16", 256, True),
        ("jax", "gpu", "bfloat16", 512, False),
        ("jax", "gpu", "float32", 64, False),
    ],
)
def test_attention_is_fused_where_the_framework_is_fast_at_it(backend, device, dtype, inner, fused):
    assert (planned("streamed", backend=backend, device=device, dtype=dtype, inner=inner).rows is None) == fused


def test_operands_that_fused_attention_does_not_take_get_chunks_or_a_small_matrix():
    half = {"device": "gpu", "dtype": "bfloat16", "has_fused": False}
    assert planned(queries=1024, **half) == Plan("pairwise")
    assert planned(queries=2**15, keys=2**15, **half) == Plan("streamed", planning.CHUNK["gpu"] // 2**16)


@pytest.mark.parametrize(
    ("backend", "dtype", "shape", "expected"),
    [  # (B, N, C') of the table of measurements on an H200, and what was the fastest there
        ("torch", "bfloat16", (4, 16384, 64), Plan("streamed")),
        ("torch", "bfloat16", (8, 6272, 256), Plan("streamed")),
        ("torch", "bfloat16", (8, 1568, 512), Plan("pairwise")),
        ("torch", "bfloat16", (2, 4200, 512), Plan("pairwise")),
        ("torch", "float32", (4, 16384, 64), Plan("streamed")),
        ("torch", "float32", (8, 6272, 128), Plan("streamed")),
        ("torch", "float32", (8, 1568, 512), Plan("pairwise")),
        ("torch", "float32", (2, 4200, 512), Plan("pairwise")),
        ("jax", "bfloat16", (4, 16384, 64), Plan("streamed")),
        ("jax", "bfloat16", (8, 6272, 256), Plan("streamed")),
        ("jax", "bfloat16", (8, 1568, 512), Plan("pairwise")),
        ("jax", "float32", (8, 1568, 512), Plan("pairwise")),
        ("tensorflow", "bfloat16", (8, 1568, 512), Plan("pairwise")),
        ("tensorflow", "float32", (8, 1568, 512), Plan("pairwise")),
    ],
)
def test_on_a_gpu_the_fastest_way_is_taken(backend, dtype, shape, expected):
    batch, positions, inner = shape
    sizes = {"batch": batch, "queries": positions, "keys": positions, "inner": inner}
    assert planned(backend=backend, device="gpu", dtype=dtype, **sizes) == expected


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("queries", [8, 100, 4096, 2**16])
def test_a_chunk_of_queries_is_an_eighth_at_most(queries, device):
    plans = (planned("streamed", device=device, queries=queries, keys=keys) for keys in (1, 1024, 4096))
    assert all(1 <= one.rows <= queries / 8 for one in plans)


@pytest.mark.parametrize("keys", [1, 1024, 2**20, 2**24])
def test_a_chunk_of_queries_holds_a_bounded_number_of_weights(keys):
    rows = planned("streamed", keys=keys).rows
    assert rows == 1 or rows * keys * SIZES["batch"] <= planning.CHUNK["cpu"]


@pytest.mark.parametrize(
    ("queries", "keys", "inner", "values"), list(itertools.product((1, 4, 50), (1, 6, 70), (1, 5, 60), (1, 8, 90)))
)
def test_the_cheaper_order_of_the_dot_product_is_taken(queries, keys, inner, values):
    first = keys * inner * values + queries * inner * values
    second = queries * keys * inner + queries * keys * values
    assert keys_first(queries, keys, inner, values) == (first <= second)


@pytest.mark.parametrize("sizes", [(None, 2, 3, 4), (1, None, 3, 4), (1, 2, None, 4), (1, 2, 3, None)])
def test_an_unknown_size_puts_the_keys_first(sizes):
    assert keys_first(*sizes)
