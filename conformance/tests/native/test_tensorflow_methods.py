"""The methods without the matrix under TensorFlow: every mode of execution, second derivatives, memory."""

import numpy as np
import pytest
import tensorflow as tf

import nonlocal_core as nlc
from nonlocal_conformance.drivers.tensorflow import TensorflowDriver
from nonlocal_core.spec.form import Form
from nonlocal_tensorflow import NonLocalBlock, nonlocal_op
from nonlocal_tensorflow.methods import sorted as sorting
from nonlocal_tensorflow.methods.streamed import streamed

STREAMED, REASSOCIATED, SORTED = EXACT = [
    ("embedded_gaussian", "streamed"),
    ("dot_product", "reassociated"),
    ("concatenation", "sorted"),
]
MODES = {"eager": lambda call: call, "graph": tf.function, "xla": tf.function(jit_compile=True)}
SOFTMAX = Form("embedded_gaussian", softmax=True, scale=-0.7)


def arrays_of(pairwise, queries=11, keys=7, inner=5, width=3, batch=2, dtype="float64"):
    """Return the arrays of an operation with sizes that all differ."""
    rng = np.random.default_rng(0)
    shapes = {"theta": (batch, queries, inner), "phi": (batch, keys, inner), "g": (batch, keys, width)}
    if pairwise == "concatenation":
        shapes |= {"concat_weight": (2 * inner,), "concat_bias": ()}
    return {name: tf.constant(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def half_masked(batch, keys):
    """Return a mask of most keys of each sample but the last, which has none."""
    return np.random.default_rng(1).random((batch, keys)) < np.append(np.full(batch - 1, 0.7), 0)[:, None]


def product_of(call, arrays):
    """Return the gradients of <gradients, v>, reverse over reverse, and the gradients."""
    rng = np.random.default_rng(2)
    directions = {name: tf.constant(rng.normal(size=a.shape), a.dtype) for name, a in arrays.items()}

    def product(arrays):
        with tf.GradientTape() as outer:
            outer.watch(arrays)
            with tf.GradientTape() as inner:
                inner.watch(arrays)
                loss = tf.reduce_sum(tf.sin(call(**arrays)))
            gradients = inner.gradient(loss, arrays)
            along = tf.add_n([tf.reduce_sum(d * directions[name]) for name, d in gradients.items()])
        return gradients, outer.gradient(along, arrays, unconnected_gradients="zero")

    return product


def assert_near(actual, expected, tolerance=1e-11):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=tolerance, atol=tolerance)


def assert_all_near(actual, expected, tolerance=1e-11):
    tf.nest.map_structure(lambda one, other: assert_near(one, other, tolerance), actual, expected)


@pytest.mark.parametrize("form", EXACT, ids=lambda form: form[1])
@pytest.mark.parametrize("batch", [0, None], ids=["known", "unknown"])
def test_without_samples_the_result_and_its_gradients_are_empty(form, batch):
    pairwise, method = form
    arrays = {name: a for name, a in arrays_of(pairwise, batch=0).items() if name in {"theta", "phi", "g"}}
    concat = {"concat_weight": tf.ones(10, "float64")} if pairwise == "concatenation" else {}

    def both(arrays):
        with tf.GradientTape() as tape:
            tape.watch(arrays)
            y = nonlocal_op(**arrays, **concat, pairwise=pairwise, method=method)
        return y, tape.gradient(y, arrays)

    if batch is None:
        both = tf.function(
            both, input_signature=[{n: tf.TensorSpec([None, *a.shape[1:]], a.dtype) for n, a in arrays.items()}]
        )
    y, gradients = both(arrays)
    assert y.shape == (0, 11, 3)
    assert {name: a.shape for name, a in gradients.items()} == {name: a.shape for name, a in arrays.items()}


@pytest.mark.parametrize(
    ("form", "masked", "mode"),
    [
        *((form, masked, "eager") for form in EXACT for masked in (False, True)),
        # Under a mask and as a graph the loop of "streamed" is in the test that follows.
        (STREAMED, False, "xla"),
        *((form, True, mode) for form in (REASSOCIATED, SORTED) for mode in ("graph", "xla")),
    ],
)
def test_both_derivatives_are_those_of_the_matrix(form, masked, mode):
    pairwise, method = form
    arrays = arrays_of(pairwise)
    options = {"pairwise": pairwise, "scale": -0.7, "key_mask": half_masked(2, 7) if masked else None}
    expected, actual = (
        product_of(lambda _method=name, **arrays: nonlocal_op(**arrays, **options, method=_method), arrays)
        for name in ("pairwise", method)
    )
    assert_all_near(MODES[mode](actual)(arrays), expected(arrays))


@pytest.mark.parametrize(
    ("rows", "masked", "mode"),
    [
        *((rows, masked, "eager") for rows in (1, 4, 11, 12) for masked in (False, True)),
        # Three chunks, the last of which is padded: traced, the others are the same loop.
        *((4, True, mode) for mode in ("graph", "xla")),
    ],
)
def test_chunks_of_any_length_give_what_the_matrix_gives(rows, masked, mode):
    arrays, mask = arrays_of("embedded_gaussian"), half_masked(2, 7) if masked else None
    # What the operation does before: keys and values are 0 where the mask is not set.
    kept = 1.0 if mask is None else tf.constant(mask[..., None], tf.float64)
    actual = product_of(lambda theta, phi, g: streamed(theta, kept * phi, kept * g, SOFTMAX, mask, rows), arrays)
    expected = product_of(
        lambda theta, phi, g: nonlocal_op(theta, phi, g, scale=-0.7, key_mask=mask, method="pairwise"), arrays
    )
    assert_all_near(MODES[mode](actual)(arrays), expected(arrays))


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize(("pairwise", "method"), EXACT)
def test_one_trace_with_unknown_sizes_serves_them_all(pairwise, method, jit):
    options, traces = {"pairwise": pairwise, "method": method}, []

    def call(**arrays):
        traces.append(1)
        with tf.GradientTape() as tape:
            tape.watch(arrays)
            y = nonlocal_op(**arrays, **options)
        return y, tape.gradient(y, arrays)

    unknown = {
        name: tf.TensorSpec([None] * a.shape.rank if a.shape.rank == 3 else a.shape, a.dtype, name=name)
        for name, a in arrays_of(pairwise).items()
    }
    traced = tf.function(call, jit_compile=jit).get_concrete_function(**unknown)
    traces.clear()
    for sizes in [(11, 7, 5, 3, 2), (300, 150, 5, 4, 1), (1, 1, 5, 1, 3)]:
        arrays = arrays_of(pairwise, *sizes)
        numbers = {name: a.numpy() for name, a in arrays.items()}
        y, gradients = traced(**arrays)
        assert_near(y, nlc.nonlocal_op(**numbers, pairwise=pairwise))
        expected = nlc.nonlocal_op_vjp(**numbers, dy=np.ones(y.shape), pairwise=pairwise)
        assert_all_near(gradients, {name: expected[name] for name in gradients}, 1e-10)
    assert not traces


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
@pytest.mark.parametrize("keys", [1, 63, 64, 200])
def test_prefix_sums_are_right_on_either_kind_of_device(kind, keys, monkeypatch):
    monkeypatch.setattr(sorting, "device", lambda: kind)
    arrays = arrays_of("concatenation", keys=keys)
    y = nonlocal_op(**arrays, pairwise="concatenation", method="sorted")
    assert_near(y, nonlocal_op(**arrays, pairwise="concatenation", method="pairwise"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("pairwise", "method"), EXACT)
def test_no_derivative_needs_the_memory_of_the_matrix(pairwise, method, mode):
    assert peak_of_second_derivatives(pairwise, method, mode) < MATRIX / 2


@pytest.mark.parametrize("mode", MODES)
def test_the_memory_of_the_matrix_is_seen_where_it_is_taken(mode):
    assert peak_of_second_derivatives("dot_product", "pairwise", mode) > MATRIX / 2


POSITIONS = 6144
MATRIX = 4 * POSITIONS**2


def peak_of_second_derivatives(pairwise, method, mode):
    """Return how much memory a call takes that gives first and second derivatives."""
    arrays = arrays_of(pairwise, POSITIONS, POSITIONS - 1, 4, 4, 1, "float32")
    call = MODES[mode](product_of(lambda **arrays: nonlocal_op(**arrays, pairwise=pairwise, method=method), arrays))
    call(arrays)
    _, peak = TensorflowDriver().peak_memory(lambda: call(arrays))
    return peak


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("pairwise", "method"), EXACT)
def test_what_is_not_finite_in_one_query_stays_there(pairwise, method, mode, value):
    arrays = arrays_of(pairwise)
    call = MODES[mode](lambda **arrays: nonlocal_op(**arrays, pairwise=pairwise, method=method))
    clean, hole = call(**arrays).numpy(), arrays["theta"].numpy()
    hole[0, 4] = value
    y = call(**{**arrays, "theta": tf.constant(hole)}).numpy()
    assert not np.isfinite(y[0, 4]).any()
    others = np.ones(y.shape[:2], bool)
    others[0, 4] = False
    assert_near(y[others], clean[others])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["pairwise", "sorted"])
def test_a_key_that_is_no_number_reaches_every_query_of_its_sample(method, mode):
    arrays = arrays_of("concatenation")
    hole = arrays["phi"].numpy()
    hole[0, 4] = np.nan
    call = MODES[mode](lambda **arrays: nonlocal_op(**arrays, pairwise="concatenation", method=method))
    y = call(**{**arrays, "phi": tf.constant(hole)}).numpy()
    assert np.isnan(y[0]).all()
    assert np.isfinite(y[1]).all()


@pytest.mark.parametrize("norm", ["batch", "affine"])
@pytest.mark.parametrize(
    ("policy", "unit"), [("float32", 2.0**-24), ("mixed_float16", 2.0**-11), ("mixed_bfloat16", 2.0**-8)]
)
def test_in_evaluation_the_norm_is_part_of_the_last_product(norm, policy, unit):
    block = NonLocalBlock(6, norm=norm, dtype=policy, residual=False)
    rng = np.random.default_rng(0)
    params = {name: rng.uniform(0.5, 1.5, a.shape) for name, a in block.export_params().items()}
    block.import_params(params)
    x = rng.normal(size=(2, 5, 7, 6)).astype("float32")
    traced = tf.function(lambda x: block(x, training=False)).get_concrete_function(x)
    assert not [node.name for node in traced.graph.as_graph_def().node if "norm/" in node.name and node.op == "Mul"]
    expected = nlc.nonlocal_block(x.astype("float64"), params, block.spec)
    assert np.abs(tf.cast(traced(x), "float64") - expected).max() < 16 * unit * np.abs(expected).max()


def test_attention_projects_the_asked_rows_and_no_values():
    block = NonLocalBlock(6, inner_channels=4)
    traced = tf.function(lambda x: block.attention(x, [3, 1])).get_concrete_function(tf.TensorSpec([2, 5, 7, 6]))
    products = [op for op in traced.graph.get_operations() if op.type == "MatMul"]
    assert sorted(op.outputs[0].shape.as_list() for op in products) == [[4, 4], [70, 4]]
