"""Products of bfloat16 operands as a GPU takes them, here on the CPU: which are narrow, and what they give."""

from collections import Counter

import keras
import numpy as np
import pytest
import tensorflow as tf

import nonlocal_core as nlc
from nonlocal_conformance.bounds import UNITS
from nonlocal_conformance.drivers.tensorflow import TensorflowDriver
from nonlocal_conformance.registry import bind
from nonlocal_tensorflow import NonLocalBlock, nonlocal_op, op
from nonlocal_tensorflow.methods import sorted as sorting

METHODS = [
    ("embedded_gaussian", "pairwise"),
    ("embedded_gaussian", "streamed"),
    ("dot_product", "pairwise"),
    ("dot_product", "reassociated"),
    ("concatenation", "pairwise"),
    ("concatenation", "sorted"),
]
UNIT = {"bfloat16": UNITS["bfloat16"], "float16": UNITS["float16"], "float32": 2.0**-24}


@pytest.fixture(autouse=True)
def _on_a_gpu(monkeypatch):
    for module in (op, sorting):
        monkeypatch.setattr(module, "device", lambda: "gpu")


def arrays_of(pairwise, dtype, queries=40, keys=33):
    """Return the arrays of an operation, which `dtype` holds."""
    rng = np.random.default_rng(0)
    shapes = {"theta": (2, queries, 5), "phi": (2, keys, 5), "g": (2, keys, 3)}
    if pairwise == "concatenation":
        shapes |= {"concat_weight": (10,), "concat_bias": ()}
    return {name: tf.cast(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def with_gradients(call, arrays, dy):
    """Return y and its gradients."""
    with tf.GradientTape() as tape:
        tape.watch(arrays)
        y = call(**arrays)
    return {"y": y} | tape.gradient(y, arrays, dy)


def second_derivatives(call, arrays, dy):
    """Return the gradients of the squares of y and of its gradients."""
    with tf.GradientTape() as tape:
        tape.watch(arrays)
        found = with_gradients(call, arrays, dy)
        squares = tf.add_n([tf.reduce_sum(tf.square(tf.cast(a, dy.dtype))) for a in found.values()])
    return tape.gradient(squares, arrays)


def assert_rounded(actual, expected, dtype):
    """Assert that no result is further off than eight roundings of its largest value."""
    assert actual.keys() == expected.keys()
    for name, wide in expected.items():
        worst = np.abs(tf.cast(actual[name], "float64") - np.asarray(wide)).max()
        assert worst <= 8 * UNIT[dtype] * np.abs(wide).max(), name


@pytest.mark.parametrize(
    ("dtype", "masked"), [("bfloat16", False), ("bfloat16", True), ("float16", True), ("float32", True)]
)
@pytest.mark.parametrize(("pairwise", "method"), METHODS)
def test_output_and_derivatives_are_those_of_the_reference(pairwise, method, dtype, masked):
    arrays, rng = arrays_of(pairwise, dtype), np.random.default_rng(1)
    mask = rng.random((2, 33)) < [[0.7], [0.0]] if masked else None
    dy = tf.cast(rng.normal(size=(2, 40, 3)), dtype)
    options = {"pairwise": pairwise, "scale": -0.7, "key_mask": mask}

    def call(method=method, **arrays):
        return nonlocal_op(**arrays, **options, method=method)

    wide, wide_dy = {name: tf.cast(a, "float64") for name, a in arrays.items()}, tf.cast(dy, "float64")
    numbers = {name: a.numpy() for name, a in wide.items()}
    gradients = nlc.nonlocal_op_vjp(**numbers, **options, dy=wide_dy.numpy())
    expected = {"y": nlc.nonlocal_op(**numbers, **options)} | gradients
    assert_rounded(with_gradients(call, arrays, dy), expected, dtype)
    expected = second_derivatives(lambda **arrays: call("pairwise", **arrays), wide, wide_dy)
    assert_rounded(second_derivatives(call, arrays, dy), expected, dtype)


@pytest.mark.parametrize(
    ("pairwise", "method", "jit"),
    [
        ("embedded_gaussian", "pairwise", False),
        ("embedded_gaussian", "streamed", True),
        ("dot_product", "reassociated", False),
        ("dot_product", "reassociated", True),
    ],
)
def test_one_trace_with_unknown_sizes_serves_them_all(pairwise, method, jit):
    def call(arrays, dy):
        return with_gradients(lambda **arrays: nonlocal_op(**arrays, pairwise=pairwise, method=method), arrays, dy)

    shapes = {"theta": [None, None, 5], "phi": [None, None, 5], "g": [None, None, 3]}
    signature = [{name: tf.TensorSpec(s, "bfloat16", name) for name, s in shapes.items()}]
    traced = tf.function(call, [*signature, tf.TensorSpec([None, None, 3], "bfloat16")], jit_compile=jit)
    for sizes in [(40, 33), (9, 700)]:
        arrays, dy = arrays_of(pairwise, "bfloat16", *sizes), tf.ones((2, sizes[0], 3), "bfloat16")
        numbers = {name: tf.cast(a, "float64").numpy() for name, a in arrays.items()}
        expected = nlc.nonlocal_op_vjp(**numbers, pairwise=pairwise, dy=np.ones(dy.shape))
        assert_rounded(traced(arrays, dy), {"y": nlc.nonlocal_op(**numbers, pairwise=pairwise)} | expected, "bfloat16")


def nodes_of(call, *arrays):
    """Return every node of a traced call and of its loops, with the shapes of its results."""
    graph = tf.function(call).get_concrete_function(*arrays).graph.as_graph_def(add_shapes=True)
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    return [
        (node, [tuple(d.size for d in shape.dim) for shape in node.attr["_output_shapes"].list.shape]) for node in nodes
    ]


@pytest.mark.parametrize(
    ("pairwise", "method", "wide", "narrow"),
    [
        ("embedded_gaussian", "pairwise", 2, 4),
        ("embedded_gaussian", "streamed", 3, 5),  # the gradient makes the weights anew, and y with them
        ("dot_product", "pairwise", 2, 4),
        ("dot_product", "reassociated", 0, 6),
        ("concatenation", "pairwise", 1, 2),
    ],
)
def test_scores_and_the_gradients_of_weights_are_wide_and_all_other_products_narrow(pairwise, method, wide, narrow):
    positions, width = 64, 5
    theta = tf.ones((2, positions, width), "bfloat16")
    concat = {"concat_weight": tf.ones(2 * width, "bfloat16")} if pairwise == "concatenation" else {}

    def step(theta):
        return with_gradients(
            lambda **arrays: nonlocal_op(**arrays, **concat, pairwise=pairwise, method=method),
            {"theta": theta, "phi": theta, "g": theta},
            theta,
        )

    products = [(node, *shapes[0][1:]) for node, shapes in nodes_of(step, theta) if node.op.startswith("BatchMatMul")]
    found = Counter((tf.as_dtype(node.attr["T"].type).name, width in shape) for node, *shape in products)
    # A wide one gives a matrix of weights, a narrow one sums over positions.
    assert found == Counter({("float32", False): wide, ("bfloat16", True): narrow})


@pytest.mark.parametrize(("kind", "dtype"), [("cpu", "float32"), ("gpu", "float32"), ("gpu", "bfloat16")])
def test_no_tensor_of_chunks_of_queries_has_more_than_an_eighth_of_the_matrix(kind, dtype, monkeypatch):
    monkeypatch.setattr(op, "device", lambda: kind)
    positions = 1024
    theta = tf.ones((1, positions, 16), dtype)

    def step(theta):
        arrays = {"theta": theta, "phi": theta, "g": theta}
        return second_derivatives(lambda **arrays: nonlocal_op(**arrays, method="streamed"), arrays, theta)

    counts = [int(np.prod(shape)) for _, shapes in nodes_of(step, theta) for shape in shapes]
    assert min(counts) >= 0  # an unknown size is -1
    assert max(counts) == positions**2 // 8


CHECKS = {"mixed_gradients", "large_scores", "score_digits"}
# Of the other forms no product is a different one.
CHECKED = [
    one
    for one in bind(TensorflowDriver())
    if one.check.name in CHECKS and one.case.spec.pairwise in {"embedded_gaussian", "dot_product"}
]


@pytest.mark.parametrize("bound", [pytest.param(one, id=one.id) for one in CHECKED])
def test_the_check_of_mixed_precision_passes(bound):
    bound()


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
def test_what_was_exported_serves_other_sizes_and_masks(tmp_path):
    block = NonLocalBlock(6, subsample=(2, 1), dtype="mixed_bfloat16", autocast=False)
    rng = np.random.default_rng(0)
    block.import_params({name: rng.uniform(0.1, 1.1, a.shape) for name, a in block.export_params().items()})
    inputs = [keras.Input((None, None, 6), name="x"), keras.Input((None, None), dtype="bool", name="mask")]
    keras.Model(inputs, block(inputs[0], key_mask=inputs[1])).export(tmp_path, verbose=False)
    loaded = tf.saved_model.load(tmp_path)
    for shape in [(2, 5, 7), (3, 4, 6)]:
        x, mask = rng.normal(size=(*shape, 6)).astype("float32"), rng.random(shape) < 0.6
        expected = nlc.nonlocal_block(x.astype("float64"), block.export_params(), block.spec, mask)
        assert_rounded({"z": loaded.serve([x, mask])}, {"z": expected}, "bfloat16")
