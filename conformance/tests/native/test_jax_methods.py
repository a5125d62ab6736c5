"""What the methods without the matrix of weights promise under JAX's transformations, and what they hold in memory."""

import math
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

import nonlocal_core as nlc
from nonlocal_conformance.assertions import assert_close
from nonlocal_conformance.drivers.jax import JaxDriver
from nonlocal_conformance.sharded.jax import quick_options
from nonlocal_core.planning import exact_method
from nonlocal_core.spec.form import Form
from nonlocal_jax import NonLocalBlock, attention, nonlocal_block, nonlocal_op, updated_statistics
from nonlocal_jax.methods.sorted import running_sums, triangular_sums
from nonlocal_jax.methods.streamed import streamed

FORMS = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
EXACT = [(form, exact_method(form)) for form in FORMS]

# Every program here runs once or twice: with these options XLA compiles it several times faster.
jit = partial(jax.jit, compiler_options=quick_options())


pytestmark = pytest.mark.usefixtures("_compile_fast")


@pytest.fixture
def x64():
    with jax.enable_x64(True):  # noqa: FBT003 - it has no other form
        yield


def arrays(form, batch=2, queries=140, keys=70, dtype="float64", seed=0):
    """Return what a form needs, by name."""
    rng = np.random.default_rng(seed)
    shapes = {"theta": (batch, queries, 4), "phi": (batch, keys, 4), "g": (batch, keys, 5)}
    if form == "concatenation":
        shapes |= {"concat_weight": (8,), "concat_bias": ()}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def mask_of(batch, keys):
    """Return a mask whose last sample has no key at all."""
    mask = np.random.default_rng(2).random((batch, keys)) < 0.6
    mask[-1] = False
    return mask


def operation(form, method, key_mask=None):
    """Return the operation as a function of a dict of arrays."""
    return lambda given: nonlocal_op(**given, pairwise=form, method=method, scale=0.7, key_mask=key_mask)


def inner(left, right):
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, left, right)))


def slope(function):
    """Return the gradient of a loss that is not quadratic in the output."""
    return jax.grad(lambda given: jnp.sum(jnp.sin(function(given))))


def forward(function):
    return function


def tangent(function):
    return lambda given: jax.jvp(function, (given,), (jax.tree.map(jnp.cos, given),))[1]


def reverse_over_reverse(function):
    return jax.grad(lambda given: inner(slope(function)(given), jax.tree.map(jnp.cos, jax.lax.stop_gradient(given))))


def forward_over_reverse(function):
    return tangent(slope(function))


def over_samples(function):
    """Return the gradients of each sample alone."""

    def of_sample(sample, shared):
        batched = {name: a[None] for name, a in sample.items()}
        return slope(function)(batched | shared)

    def call(given):
        shared = {name: a for name, a in given.items() if name.startswith("concat")}
        samples = {name: a for name, a in given.items() if name not in shared}
        return jax.vmap(of_sample, in_axes=(0, None))(samples, shared)

    return call


def checkpointed(function):
    return slope(jax.checkpoint(function))


@cache
def with_matrix(form, transform, *, masked=False):
    """Return what a transformation gives with the matrix of weights, in 64 bits."""
    given = arrays(form)
    mask = mask_of(*given["phi"].shape[:2]) if masked else None
    return jit(transform(operation(form, "pairwise", mask)))(given)


def assert_trees_close(actual, expected, rtol=1e-11):
    """Compare leaf by leaf, relative to the largest value of all."""
    scale = max(np.abs(a).max() for a in jax.tree.leaves(expected))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=rtol * scale), actual, expected)


# Derivatives


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("transform", "plain"),  # the second has the same values, and one program serves both
    [
        (tangent, tangent),
        (slope, slope),
        (checkpointed, slope),
        (forward_over_reverse, forward_over_reverse),
        (reverse_over_reverse, forward_over_reverse),
        (over_samples, over_samples),
    ],
)
@pytest.mark.parametrize(("form", "method"), EXACT[1:])
def test_every_transformation_gives_what_it_gives_with_the_matrix(form, method, transform, plain):
    assert_trees_close(jit(transform(operation(form, method)))(arrays(form)), with_matrix(form, plain))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("transform", "plain"), [(slope, slope), (reverse_over_reverse, forward_over_reverse)])
@pytest.mark.parametrize(("form", "method"), EXACT[1:])
def test_masked_keys_have_no_part_in_any_derivative(form, method, transform, plain):
    given = arrays(form)
    mask = mask_of(*given["phi"].shape[:2])
    for name in ("phi", "g"):
        given[name][~mask] = np.inf
    actual = jit(transform(operation(form, method, mask)))(given)
    assert_trees_close(actual, with_matrix(form, plain, masked=True))


@cache
def compiled(form, method):
    return jit(operation(form, method))


@pytest.mark.parametrize("bad", [np.inf, np.nan])
@pytest.mark.parametrize(("form", "method"), EXACT[1:])
def test_one_bad_query_spoils_its_own_row_alone(form, method, bad):
    given = arrays(form, dtype="float32")
    function = compiled(form, method)
    expected = np.delete(function(given), 3, axis=1).astype("float64")
    given["theta"][:, 3] = bad
    assert_close("the other rows", np.delete(function(given), 3, axis=1), expected, dtype="float32")


# Sizes


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("batch", "queries", "rows"),
    [
        (1, 10, 1),  # a query
        (1, 10, 4),  # a part of a set, the last one shorter
        (1, 10, 10),  # a set
        (3, 10, 1),  # as many queries as there are sets, the last block shorter
        (3, 10, 4),  # a set and room for no other
        (3, 10, 100),  # all sets, and room for more
        (7, 3, 1),  # two sets, and one left over
        (7, 3, 4),
        (2, 1, 1),  # sets of one query
        (2, 1, 100),
        (0, 4, 1),
        (2, 0, 4),
    ],
)
def test_blocks_of_queries_may_hold_several_sets_or_a_part_of_one(batch, queries, rows):
    given = arrays("gaussian", batch, queries, 6)
    form = Form("gaussian", softmax=True, scale=-0.7)
    y = jit(lambda theta, phi, g: streamed(theta, phi, g, form, None, rows))(**given)
    np.testing.assert_allclose(y, nlc.nonlocal_op(**given, pairwise="gaussian", scale=-0.7), rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("keys", [1, 2, 127, 128, 129, 400])
def test_sorted_keys_fill_blocks_of_any_size(keys):
    given = arrays("concatenation", queries=9, keys=keys)
    y = jit(operation("concatenation", "sorted"))(given)
    np.testing.assert_allclose(y, nlc.nonlocal_op(**given, pairwise="concatenation", scale=0.7), rtol=1e-11)


def test_accelerators_and_processors_add_up_the_same_blocks():
    values = np.random.default_rng(0).integers(-9, 9, (5, 2, 3, 4)).astype("float32")
    for one, other in zip(running_sums(values), triangular_sums(values), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("form", "method", "sizes", "masked"),
    [
        ("embedded_gaussian", "streamed", "b,n,m", True),
        ("embedded_gaussian", "streamed", "2,n,m", False),
        ("embedded_gaussian", "streamed", "b,140,70", True),
        ("dot_product", "reassociated", "b,n,m", True),
        ("dot_product", "reassociated", "2,n,m", False),
        ("dot_product", "reassociated", "b,140,70", False),
        ("concatenation", "sorted", "b,n,m", False),  # keys of unknown number get a mask where there is none
        ("concatenation", "sorted", "2,n,m", True),
        ("concatenation", "sorted", "b,140,70", True),
    ],
)
def test_a_method_is_exported_with_symbolic_sizes_and_its_gradients(form, method, sizes, masked):
    batch, queries, keys = export.symbolic_shape(sizes)
    given = arrays(form)
    mask = mask_of(*given["phi"].shape[:2]) if masked else None
    shapes = {"theta": (batch, queries, 4), "phi": (batch, keys, 4), "g": (batch, keys, 5)}
    symbolic = {name: jax.ShapeDtypeStruct(shapes.get(name, a.shape), a.dtype) for name, a in given.items()}
    symbolic_mask = jax.ShapeDtypeStruct((batch, keys), bool) if masked else None

    def call(given, mask):
        y, pull = jax.vjp(operation(form, method, mask), given)
        return y, *pull(y)

    exported = export.export(jax.jit(call))(symbolic, symbolic_mask)
    actual = jit(export.deserialize(exported.serialize()).call)(given, mask)
    options = {"pairwise": form, "scale": 0.7, "key_mask": mask}
    y = nlc.nonlocal_op(**given, **options)
    assert_trees_close(actual, (y, nlc.nonlocal_op_vjp(**given, **options, dy=y)))


@pytest.mark.parametrize(("form", "method"), EXACT[1:])
def test_sizes_that_a_stride_has_divided_are_exported_with_gradients(form, method):
    given = arrays(form, dtype="float32")

    def halved(given):
        return {name: a[:, : a.shape[1] // 2] if a.ndim == 3 else a for name, a in given.items()}

    def gradient(given, method):
        return jax.grad(lambda given: jnp.sum(operation(form, method)(halved(given)) ** 2))(given)

    sizes = export.symbolic_shape("b,n,m")
    shapes = {"theta": (*sizes[:2], 4), "phi": (*sizes[::2], 4), "g": (*sizes[::2], 5)}
    symbolic = {name: jax.ShapeDtypeStruct(shapes.get(name, a.shape), a.dtype) for name, a in given.items()}
    actual = jit(export.export(jax.jit(partial(gradient, method=method)))(symbolic).call)(given)
    assert_trees_close(actual, jit(partial(gradient, method="pairwise"))(given), rtol=1e-5)


# Memory


def programs(jaxpr):
    """Return a program and all programs inside it."""
    inside = [
        getattr(value, "jaxpr", value)
        for equation in jaxpr.eqns
        for parameter in equation.params.values()
        for value in (parameter if isinstance(parameter, tuple | list) else [parameter])
        if hasattr(getattr(value, "jaxpr", value), "eqns")
    ]
    return [jaxpr, *(one for program in inside for one in programs(program))]


def equations(function, *args):
    """Return every equation that a function consists of."""
    return [equation for one in programs(jax.make_jaxpr(function)(*args).jaxpr) for equation in one.eqns]


def largest_array(function, *args):
    """Return the number of elements of the largest array that a function makes."""
    return max(out.aval.size for equation in equations(function, *args) for out in equation.outvars)


@pytest.mark.parametrize("transform", [forward, slope, reverse_over_reverse, forward_over_reverse])
@pytest.mark.parametrize(("form", "method"), EXACT)
def test_no_array_has_the_size_of_the_matrix(form, method, transform):
    given = arrays(form, batch=1, queries=4096, keys=4096, dtype="float32")
    matrix = 4096**2
    assert largest_array(transform(operation(form, "pairwise")), given) >= matrix
    assert largest_array(transform(operation(form, method)), given) <= matrix / 8


@pytest.mark.parametrize("transform", [slope, reverse_over_reverse])
def test_compiled_blocks_of_queries_need_memory_for_one_block(transform):
    def temporary(queries):
        given = arrays("gaussian", batch=1, queries=queries, keys=4096, dtype="float32")
        program = jax.jit(transform(operation("gaussian", "streamed"))).lower(given).compile()
        return program.memory_analysis().temp_size_in_bytes

    one, both = temporary(4096), temporary(8192)
    matrix = 8192 * 4096 * 4
    assert both < 1.5 * one
    assert both < matrix / 4


def test_the_suite_sees_the_matrix_in_what_the_compiler_plans_to_hold():
    spec, positions, driver = nlc.NonLocalSpec(channels=4), 2048, JaxDriver()
    x, matrix = np.zeros((1, positions, 4), "float32"), 4 * positions**2
    params = {name: np.zeros(shape, "float32") for name, shape in nlc.param_shapes(spec).items()}
    for call in (driver.block, partial(driver.vjp, dz=x)):
        _, whole = driver.planned_memory(partial(call, spec, params, x, method="pairwise"))
        _, chunks = driver.planned_memory(partial(call, spec, params, x, method="streamed"))
        assert whole >= matrix
        assert chunks < matrix / 2


# The block


SPEC = nlc.NonLocalSpec(channels=6, inner_channels=2)


def block_arrays(spec, *shape):
    rng = np.random.default_rng(0)
    params = {name: rng.uniform(0.1, 1.1, size).astype("float32") for name, size in nlc.param_shapes(spec).items()}
    return rng.normal(size=(*shape, spec.channels)).astype("float32"), params


@pytest.mark.parametrize(
    ("options", "masked", "products"),
    [
        ({}, False, 4),  # theta, phi and g together, the scores, the sums and W_z
        ({}, True, 4),
        ({"subsample": 2}, False, 4),
        ({"subsample": 2}, True, 4),
        ({"subsample": 2, "subsample_at": "input"}, True, 5),  # phi and g from the pooled input
        ({"pairwise": "gaussian", "subsample": 2}, False, 4),  # g instead of the three
        ({"pairwise": "dot_product"}, False, 4),
        ({"pairwise": "concatenation"}, False, 5),  # the scores are made of two products
    ],
)
def test_what_has_one_input_is_projected_by_one_product(options, masked, products):
    spec = SPEC.replace(**options)
    x, params = block_arrays(spec, 3, 4, 6)
    mask = np.ones(x.shape[:-1], bool) if masked else None
    found = equations(lambda x, params: nonlocal_block(x, params, spec, mask, method="pairwise"), x, params)
    assert sum(equation.primitive.name == "dot_general" for equation in found) == products


def test_attention_projects_the_rows_that_are_asked_for_and_no_values():
    x, params = block_arrays(SPEC, 1, 500)
    found = equations(lambda x, params: attention(x, params, SPEC, [3, 7]), x, params)
    products = [equation.outvars[0].aval.size for equation in found if equation.primitive.name == "dot_general"]
    assert sorted(products) == [2 * 2, 2 * 500, 500 * 2]


@pytest.mark.parametrize(("form", "method"), EXACT)
def test_the_method_of_a_block_reaches_its_every_use(form, method):
    spec = SPEC.replace(pairwise=form, norm="batch")
    x, params = block_arrays(spec, 1, 4096)

    def module(name):
        block = NonLocalBlock.from_spec(spec, method=name, rngs=nnx.Rngs(0))
        block.eval()
        graph, state = nnx.split(block)
        return lambda x, _: nnx.merge(graph, state)(x)

    def function(name):
        return lambda x, params: nonlocal_block(x, params, spec, method=name)

    def statistics(name):
        return lambda x, params: updated_statistics(x, params, spec, method=name)

    for use in (module, function, statistics):
        assert largest_array(use("pairwise"), x, params) >= 4096**2
        assert largest_array(use(method), x, params) <= 4096**2 / 8


@pytest.mark.parametrize("method", ["auto", "sorted", "pairwise"])
def test_inf_at_a_masked_position_reaches_no_other(method):
    spec = nlc.NonLocalSpec(channels=6, pairwise="concatenation", subsample=2)
    x, params = block_arrays(spec, 2, 6, 8)
    mask = np.ones(x.shape[:-1], bool)
    mask[:, 2:4, 3] = False
    function = jit(lambda x: nonlocal_block(x, params, spec, mask, method=method))
    expected = np.array(function(x), "float64")
    x[~mask] = np.inf
    z = np.asarray(function(x))
    assert_close("the other positions", z[mask], expected[mask], dtype="float32")


# Precision


def operands_of_products(form, method, dtype):
    """Return the dtypes and sizes of the operands of all products in a training step, and their precisions."""
    spec = nlc.NonLocalSpec(channels=16, pairwise=form)
    params = {name: jnp.zeros(shape, "float32") for name, shape in nlc.param_shapes(spec).items()}

    def loss(x, params):
        return jnp.sum(nonlocal_block(x, params, spec, method=method, dtype=dtype) ** 2)

    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(jnp.zeros((2, 512, 16)), params).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    shapes = [shape.split("x") for line in products for shape in re.findall(r"tensor<([^>]+)>", line)[:2]]
    return {(kind, math.prod(map(int, sizes))) for *sizes, kind in shapes}, products


@pytest.mark.parametrize(("form", "method"), [*EXACT, *((form, "pairwise") for form in FORMS)])
def test_no_product_of_a_training_step_widens_bfloat16_operands(form, method):
    operands, _ = operands_of_products(form, method, "bfloat16")
    assert any(kind == "bf16" for kind, _ in operands)
    assert not {size for kind, size in operands if kind == "f32" and size >= 2 * 512}


@pytest.mark.parametrize(("form", "method"), EXACT)
def test_every_product_of_float32_is_in_full_precision(form, method):
    operands, products = operands_of_products(form, method, "float32")
    assert {kind for kind, _ in operands} == {"f32"}
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)
