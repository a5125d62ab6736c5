"""The reference against the formulas, written out once more as loops over single positions."""

import itertools
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import nonlocal_core as nlc
from nonlocal_conformance import CASES
from nonlocal_conformance.cases import beyond_first, relu_of_product
from nonlocal_core.planning import exact_method
from nonlocal_core.reference.exact import EXACT, EXACT_VJP
from nonlocal_core.reference.operation import query_chunks
from nonlocal_core.spec.form import Form


def exactly(message):
    return f"^{re.escape(message)}$"


ONE_VALUE = exactly("`x` must have more than one value per channel in training with norm 'batch'. Got 1.")


def interacts(spec, query, key):
    """Whether two positions lie in the same set."""
    if spec.group_size is not None:
        return query[0] // spec.group_size == key[0] // spec.group_size
    inner = {"all": range(len(query)), "space": (1, 2), "time": (0,)}.get(spec.axes, spec.axes)
    return all(query[axis] == key[axis] for axis in range(len(query)) if axis not in inner)


def windows(spec, spatial):
    """List the windows, each as the positions that it pools."""
    rank = len(spatial)
    inner = {"all": range(rank), "space": (1, 2), "time": (0,)}.get(spec.axes, spec.axes)
    window = spec.subsample if isinstance(spec.subsample, tuple) else (spec.subsample or 1,) * rank
    window = [length if axis in inner else 1 for axis, length in enumerate(window)]
    starts = []
    for axis, (size, length) in enumerate(zip(spatial, window, strict=True)):
        span = spec.group_size if axis == 0 and spec.group_size else size
        starts.append(
            [first + offset for first in range(0, size, span) for offset in range(0, span - length + 1, length)]
        )
    return [
        list(itertools.product(*(range(s, s + length) for s, length in zip(start, window, strict=True))))
        for start in itertools.product(*starts)
    ]


def project(a, params, layer):
    return params[f"{layer}.weight"] @ a + params.get(f"{layer}.bias", 0.0)


def keys_of_sample(x, valid, params, spec):
    """List phi, g and the pooled positions of every key of one sample that is valid."""
    keys = []
    for window in windows(spec, x.shape[:-1]):
        positions = [position for position in window if valid[position]]
        if not positions:
            continue
        if spec.subsample_at == "input":
            pooled = np.max([x[position] for position in positions], axis=0)
            phi = pooled if spec.pairwise == "gaussian" else project(pooled, params, "phi")
            g = project(pooled, params, "g")
        else:
            phi = [x[p] if spec.pairwise == "gaussian" else project(x[p], params, "phi") for p in positions]
            phi, g = np.max(phi, axis=0), np.max([project(x[p], params, "g") for p in positions], axis=0)
        keys.append((phi, g, window[0]))
    return keys


def score(theta, phi, params, spec):
    if spec.pairwise is relu_of_product:
        return max((theta + 1.0) @ phi, 0.0)
    if spec.pairwise == "concatenation":
        return max(params["concat.weight"] @ np.concatenate([theta, phi]) + params.get("concat.bias", 0.0), 0.0)
    return theta @ phi


def summed(theta, keys, params, spec):
    """Return y_i for one query and the pairs of phi and g that it sees."""
    scale = {None: 1.0, "inner": spec.inner_channels**-0.5, "input": spec.channels**-0.5}.get(spec.scale, spec.scale)
    softmax = spec.normalize == "softmax" or spec.pairwise in {"gaussian", "embedded_gaussian"}
    scores = [scale * score(theta, phi, params, spec) for phi, _ in keys]
    weights = [math.exp(s) if softmax else s for s in scores]
    total = sum(weights) if softmax else len(keys)
    return sum(w * g for w, (_, g) in zip(weights, keys, strict=True)) / total if keys else 0.0


def gathered(x, valid, params, spec):
    """Return y_i for every position of one sample."""
    keys, y = keys_of_sample(x, valid, params, spec), np.zeros((*x.shape[:-1], spec.inner_channels))
    for query in np.ndindex(x.shape[:-1]):
        theta = x[query] if spec.pairwise == "gaussian" else project(x[query], params, "theta")
        if spec.pairwise is beyond_first:
            first = next(other for other in np.ndindex(x.shape[:-1]) if interacts(spec, query, other))
            theta = theta - project(x[first], params, "theta")
        y[query] = summed(theta, [(phi, g) for phi, g, at in keys if interacts(spec, query, at)], params, spec)
    return y


def by_loops(x, params, spec, key_mask, training):
    valid = np.ones(x.shape[:-1], bool) if key_mask is None else key_mask
    r = np.empty_like(x)
    for sample in range(len(x)):
        y = gathered(x[sample], valid[sample], params, spec)
        for query in np.ndindex(y.shape[:-1]):
            r[sample][query] = project(y[query], params, "out")
    if spec.norm is not None:
        mean, variance = params.get("norm.mean", 0.0), params.get("norm.variance", 1.0 - spec.norm_epsilon)
        if spec.norm == "batch" and training and valid.any():
            mean, variance = r[valid].mean(axis=0), r[valid].var(axis=0)
        r = params["norm.weight"] * (r - mean) / np.sqrt(variance + spec.norm_epsilon) + params["norm.bias"]
    return x + r if spec.residual else r


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_the_reference_equals_loops_over_single_positions(case):
    data = case.data()
    expected = by_loops(data.x, data.params, case.spec, data.key_mask, case.training)
    actual = nlc.nonlocal_block(data.x, data.params, case.spec, data.key_mask, case.training)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize("case", [case for case in CASES.values() if not case.training], ids=lambda case: case.name)
def test_the_rows_of_the_weights_sum_the_values_to_what_the_loops_gather(case):
    data, spec = case.data(), case.spec
    valid = np.ones(data.x.shape[:-1], bool) if data.key_mask is None else data.key_mask
    weights = nlc.attention(data.x, data.params, spec, key_mask=data.key_mask)
    starts = sorted(window[0] for window in windows(spec, case.spatial))
    for sample in range(case.batch):
        values = np.zeros((len(starts), spec.inner_channels))
        for _, g, at in keys_of_sample(data.x[sample], valid[sample], data.params, spec):
            values[starts.index(at)] = g
        y = gathered(data.x[sample], valid[sample], data.params, spec).reshape(-1, spec.inner_channels)
        np.testing.assert_allclose(weights[sample] @ values, y, rtol=0, atol=1e-12 * max(1.0, np.abs(y).max()))
    some = nlc.attention(data.x, data.params, spec, np.array([2, 0]) % weights.shape[1], data.key_mask)
    np.testing.assert_allclose(some, weights[:, np.array([2, 0]) % weights.shape[1]], rtol=0, atol=1e-14)


# The operation alone: its options, and whether keys are masked.
OPERATIONS = [
    ({"pairwise": "gaussian"}, False),
    ({"pairwise": "gaussian", "scale": -0.7}, True),
    ({"pairwise": "embedded_gaussian", "scale": 0.3}, True),
    ({"pairwise": "dot_product", "scale": 1.5}, False),
    ({"pairwise": "dot_product"}, True),
    ({"pairwise": "concatenation"}, False),
    ({"pairwise": "concatenation", "concat_bias": 0.4, "scale": -2.0}, True),
]


def operation(options, masked):
    """Return arrays and options of `nonlocal_op`; the last sample of a mask has no key."""
    rng = np.random.default_rng(5)
    sizes = {"theta": (2, 5, 3), "phi": (2, 4, 3), "g": (2, 4, 2), "concat_weight": (6,)}
    arrays = {name: rng.normal(size=size) for name, size in sizes.items()}
    if options["pairwise"] != "concatenation":
        del arrays["concat_weight"]
    options = {**options, "key_mask": np.array([[True, False, True, True], [False] * 4]) if masked else None}
    bias = {"concat_bias": np.asarray(options.pop("concat_bias"))} if "concat_bias" in options else {}
    return arrays | bias, options


def operation_by_loops(arrays, options):
    kept = {name: options.get(name) for name in ("pairwise", "scale", "normalize")}
    spec = nlc.NonLocalSpec(channels=3, inner_channels=3, **kept)
    params = {name.replace("_", "."): a for name, a in arrays.items()}
    valid = np.ones((2, 4), bool) if options["key_mask"] is None else options["key_mask"]
    y = np.empty((2, 5, 2))
    for sample, query in np.ndindex(2, 5):
        keys = [(arrays["phi"][sample, key], arrays["g"][sample, key]) for key in np.flatnonzero(valid[sample])]
        y[sample, query] = summed(arrays["theta"][sample, query], keys, params, spec)
    return y


def methods(options):
    return ("auto", "pairwise", exact_method(options["pairwise"]))


@pytest.mark.parametrize(("options", "masked"), OPERATIONS)
def test_the_operation_equals_loops_over_queries_and_keys_by_every_method(options, masked):
    arrays, options = operation(options, masked)
    for method in methods(options):
        y = nlc.nonlocal_op(**arrays, **options, method=method)
        np.testing.assert_allclose(y, operation_by_loops(arrays, options), rtol=0, atol=1e-13)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("normalize", ["softmax", "count"])
def test_the_operation_with_a_function_equals_the_loops(normalize, masked):
    options = {"pairwise": relu_of_product, "normalize": normalize, "scale": 0.4}
    arrays, options = operation(options, masked)
    y = nlc.nonlocal_op(**arrays, **options)
    np.testing.assert_allclose(y, operation_by_loops(arrays, options), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("options", "masked"), OPERATIONS)
def test_the_gradients_of_the_operation_equal_finite_differences_by_every_method(options, masked):
    arrays, options = operation(options, masked)
    dy, rng = np.random.default_rng(6).normal(size=(2, 5, 2)), np.random.default_rng(7)
    directions = {name: rng.normal(size=a.shape) for name, a in arrays.items()}
    for method, name in itertools.product(methods(options), arrays):
        gradients = nlc.nonlocal_op_vjp(**arrays, dy=dy, **options, method=method)
        assert gradients.keys() == arrays.keys()
        assert gradients[name].shape == arrays[name].shape
        values = [
            (operation_by_loops({**arrays, name: arrays[name] + step * directions[name]}, options) * dy).sum()
            for step in (1e-6, -1e-6)
        ]
        assert (gradients[name] * directions[name]).sum() == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-7)


@pytest.mark.parametrize(
    ("pairwise", "method", "values", "gradients"),
    [
        ("gaussian", "auto", [], []),
        ("gaussian", "streamed", ["streamed"], []),
        ("embedded_gaussian", "streamed", ["streamed"], []),
        ("dot_product", "pairwise", [], []),
        ("dot_product", "reassociated", ["reassociated"], ["reassociated_vjp"]),
        ("concatenation", "auto", [], []),
        ("concatenation", "sorted", ["sorted_"], ["sorted_vjp"]),
    ],
)
def test_a_method_without_the_matrix_computes_where_it_is_named(monkeypatch, pairwise, method, values, gradients):
    calls = []

    def noted(compute):
        return lambda *given: calls.append(compute.__name__) or compute(*given)

    for table in (EXACT, EXACT_VJP):
        for name, compute in list(table.items()):
            monkeypatch.setitem(table, name, noted(compute))
    case = CASES[f"{pairwise}_1d"]
    data, (arrays, options) = case.data(), operation({"pairwise": pairwise}, masked=False)
    for call, expected in (
        (lambda: nlc.nonlocal_op(**arrays, **options, method=method), values),
        (lambda: nlc.nonlocal_op_vjp(**arrays, dy=arrays["theta"][..., :2], **options, method=method), gradients),
        (lambda: nlc.nonlocal_block(data.x, data.params, case.spec, method=method), values),
        (lambda: nlc.nonlocal_block_vjp(data.x, data.params, case.spec, data.dz, method=method), values + gradients),
    ):
        calls.clear()
        call()
        assert calls == expected


@pytest.mark.parametrize(("name", "share"), [("embedded_gaussian_training", 0.3), ("training_masked", 0.1)])
@pytest.mark.parametrize(
    "options", [{}, {"unbiased": False}, {"unbiased": True}], ids=["default", "biased", "unbiased"]
)
def test_the_running_statistics_move_by_the_momentum_towards_those_of_the_branch(name, share, options):
    case = CASES[name]
    data, params = case.data(), case.data().params
    # With a norm that does nothing and no residual, the output is the branch before the norm.
    plain = {name: a for name, a in params.items() if not name.startswith("norm.")}
    branch = by_loops(data.x, plain, case.spec.replace(norm=None, residual=False), data.key_mask, training=False)
    moved = nlc.updated_statistics(data.x, params, case.spec, data.key_mask, **options)
    shown = branch[np.ones(branch.shape[:-1], bool) if data.key_mask is None else data.key_mask]
    mean, variance = shown.mean(axis=0), shown.var(axis=0, ddof=int(options.get("unbiased", False)))
    for statistic, new in (("norm.mean", mean), ("norm.variance", variance)):
        expected = (1 - share) * params[statistic] + share * new
        np.testing.assert_allclose(moved[statistic], expected, rtol=1e-12, err_msg=statistic)


def moved(data, direction, step):
    params = {name: a + step * direction.get(name, 0.0) for name, a in data.params.items()}
    return data.x + step * direction["x"], params


@pytest.mark.parametrize(
    "case", [case for case in CASES.values() if case.is_differentiable and not case.ties], ids=lambda case: case.name
)
def test_the_gradients_equal_finite_differences_along_each_parameter(case):
    data, spec, rng = case.data(), case.spec, np.random.default_rng(2)
    dx, dparams = nlc.nonlocal_block_vjp(data.x, data.params, spec, data.dz, data.key_mask, case.training)
    assert set(dparams) == set(data.params) - {"norm.mean", "norm.variance"}
    gradients = {"x": dx, **dparams}
    assert all(gradient.shape == data.params[name].shape for name, gradient in dparams.items())
    scale = max(np.abs(gradient).sum() for gradient in gradients.values())
    for name, gradient in gradients.items():
        direction = {"x": np.zeros_like(dx), name: rng.normal(size=gradient.shape)}
        values = []
        for step in (1e-6, -1e-6):
            x, params = moved(data, direction, step)
            values.append((nlc.nonlocal_block(x, params, spec, data.key_mask, case.training) * data.dz).sum())
        assert (gradient * direction[name]).sum() == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-7 * scale)


def test_a_tie_in_a_window_sends_the_gradient_to_its_first_position_in_row_major_order():
    spec = nlc.NonLocalSpec(channels=1, pairwise="gaussian", subsample=2, subsample_at="input", residual=False)
    params = {name: np.ones(shape) for name, shape in nlc.param_shapes(spec).items()}
    x = np.array([[0.0, 1.0], [1.0, 1.0]]).reshape(1, 2, 2, 1)
    dx, _ = nlc.nonlocal_block_vjp(x, params, spec, np.ones_like(x))
    assert np.flatnonzero(dx).tolist() == [1]


@pytest.mark.parametrize("valid", [0, 1])
def test_of_one_position_or_none_that_is_not_masked_the_running_statistics_take_what_there_is(valid):
    case = CASES["embedded_gaussian_training"]
    data, mask = case.data(), np.zeros((2, 5, 7), bool)
    mask[0, 0, :valid] = True
    moved = nlc.updated_statistics(data.x, data.params, case.spec, mask, unbiased=True)
    if valid:  # its deviation from itself is 0
        np.testing.assert_allclose(moved["norm.variance"], 0.7 * data.params["norm.variance"], rtol=1e-12)
    else:
        assert all(np.array_equal(moved[name], data.params[name]) for name in moved)


def test_keys_that_are_masked_reach_no_gradient_even_if_they_are_infinite():
    theta, phi, g, dy = np.ones((1, 2, 3)), np.ones((1, 4, 3)), np.ones((1, 4, 2)), np.ones((1, 2, 2))
    mask = np.array([[True, False, True, True]])
    phi[0, 1], g[0, 1] = np.inf, np.nan
    gradients = nlc.nonlocal_op_vjp(theta, phi, g, dy, key_mask=mask)
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())
    assert not gradients["phi"][0, 1].any()
    assert not gradients["g"][0, 1].any()


@pytest.mark.parametrize("call", [nlc.nonlocal_block, nlc.nonlocal_block_vjp], ids=["block", "vjp"])
def test_one_value_per_channel_has_no_statistics_in_training(call):
    case = CASES["epsilon"]
    data = case.data()
    x = data.x[:1, :1, :1]
    given = (x, data.params, case.spec, x)[: 3 if call is nlc.nonlocal_block else 4]
    with pytest.raises(ValueError, match=ONE_VALUE):
        call(*given, training=True)
    call(*given)


def test_one_value_per_channel_moves_no_running_statistics():
    case = CASES["epsilon"]
    data = case.data()
    with pytest.raises(ValueError, match=ONE_VALUE):
        nlc.updated_statistics(data.x[:1, :1, :1], data.params, case.spec)


def test_a_relu_at_zero_has_gradient_zero():
    theta, phi, g = np.ones((1, 1, 1)), -np.ones((1, 1, 1)), np.ones((1, 1, 1))
    options = {"pairwise": "concatenation", "concat_weight": np.ones(2)}
    gradients = nlc.nonlocal_op_vjp(theta, phi, g, np.ones((1, 1, 1)), **options)
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("name", ["embedded_gaussian_masked_projection", "dot_product_2d", "concat_bias"])
def test_queries_in_blocks_give_what_one_block_gives(monkeypatch, name):
    case = CASES[name]
    data = case.data()

    def results():
        z = nlc.nonlocal_block(data.x, data.params, case.spec, data.key_mask)
        dx, dparams = nlc.nonlocal_block_vjp(data.x, data.params, case.spec, data.dz, data.key_mask)
        return {"z": z, "dx": dx, **dparams}

    whole = results()
    monkeypatch.setattr("nonlocal_core.reference.operation.CHUNK", 200)
    scale = max(np.abs(value).max() for value in whole.values())
    for key, value in results().items():
        np.testing.assert_allclose(value, whole[key], rtol=0, atol=1e-13 * scale)


def test_a_function_gets_its_queries_whole(monkeypatch):
    sizes = []

    def scores(theta, phi):
        sizes.append(theta.shape[1])
        return theta @ phi.mT

    monkeypatch.setattr("nonlocal_core.reference.operation.CHUNK", 1)
    theta = np.ones((2, 5, 3))
    nlc.nonlocal_op(theta, theta, theta, pairwise=scores, normalize="softmax")
    nlc.nonlocal_op(theta, theta, theta)
    assert sizes == [5]


def test_chunks_of_queries_hold_no_more_weights_than_they_may(monkeypatch):
    monkeypatch.setattr("nonlocal_core.reference.operation.CHUNK", 40)
    form = Form("dot_product", softmax=False, scale=1.0)
    chunks = list(query_chunks(np.ones((2, 9, 3)), np.ones((2, 5, 3)), form))
    assert [(rows.start, rows.stop) for rows in chunks] == [(0, 4), (4, 8), (8, 9)]
    monkeypatch.setattr("nonlocal_core.reference.operation.CHUNK", 1)
    assert len(list(query_chunks(np.ones((2, 9, 3)), np.ones((2, 5, 3)), form))) == 9


@pytest.mark.parametrize(("queries", "expected"), [(0, [(0, 0)]), (1, [(0, 1)]), (2, [(0, 1), (1, 2)])])
def test_one_weight_for_a_chunk_is_one_query_of_one_key(monkeypatch, queries, expected):
    monkeypatch.setattr("nonlocal_core.reference.operation.CHUNK", 1)
    form = Form("dot_product", softmax=False, scale=1.0)
    chunks = query_chunks(np.ones((1, queries, 3)), np.ones((1, 1, 3)), form)
    assert [(rows.start, rows.stop) for rows in chunks] == expected
    monkeypatch.setattr("nonlocal_core.reference.operation.CHUNK", 2)
    assert len(list(query_chunks(np.ones((1, 4, 3)), np.ones((1, 1, 3)), form))) == 2


def test_gradients_of_half_precision_are_rounded_only_at_the_end(monkeypatch):
    monkeypatch.setattr("nonlocal_core.reference.operation.CHUNK", 1)
    ones = np.ones((1, 1, 1), np.float16)
    # 2048 + 1 is 2048 in half precision, and 2050 is a number of its own.
    theta, dy = np.array([2048, 1, 1], np.float16).reshape(1, 3, 1), np.ones((1, 3, 1), np.float16)
    gradients = nlc.nonlocal_op_vjp(
        theta, ones, ones, dy, pairwise="concatenation", concat_weight=np.ones(2, np.float16), concat_bias=ones[0, 0, 0]
    )
    assert gradients["concat_weight"].tolist() == [2050, 3]
    assert {a.dtype.name for a in gradients.values()} == {"float16"}


def test_scores_of_any_size_give_finite_weights():
    theta, g = np.array([[[1e200], [-1e200]]]), np.arange(3.0).reshape(1, 3, 1)
    y = nlc.nonlocal_op(theta, np.array([[[1e100], [0.0], [-1e100]]]), g)
    assert y[0, :, 0].tolist() == [0.0, 2.0]


@pytest.mark.parametrize("pairwise", ["gaussian", "embedded_gaussian", "dot_product"])
def test_the_forms_differ_only_in_scores_and_weights(pairwise):
    rng = np.random.default_rng(0)
    theta, phi, g = rng.normal(size=(2, 5, 3)), rng.normal(size=(2, 4, 3)), rng.normal(size=(2, 4, 2))
    scores = theta @ phi.mT
    weights = scores / 4 if pairwise == "dot_product" else np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(nlc.nonlocal_op(theta, phi, g, pairwise=pairwise), weights @ g, rtol=1e-13)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_result_has_the_dtype_of_the_input(dtype):
    case = CASES["embedded_gaussian_training"]
    data = case.data(dtype)
    dx, dparams = nlc.nonlocal_block_vjp(data.x, data.params, case.spec, data.dz, training=True)
    statistics = nlc.updated_statistics(data.x, data.params, case.spec)
    z = nlc.nonlocal_block(data.x, data.params, case.spec)
    assert {a.dtype for a in (z, dx, *dparams.values(), *statistics.values())} == {np.dtype(dtype)}


def test_an_empty_batch_gives_an_empty_result():
    spec = nlc.NonLocalSpec(channels=3, norm="batch", subsample=2)
    params = nlc.init_params(spec, np.random.default_rng(0))
    x = np.zeros((0, 4, 5, 3))
    assert nlc.nonlocal_block(x, params, spec).shape == x.shape
    assert nlc.nonlocal_block_vjp(x, params, spec, x)[0].shape == x.shape
    assert nlc.attention(x, params, spec).shape == (0, 20, 4)


@pytest.mark.parametrize("norm", [None, "affine"])
def test_statistics_without_a_batch_norm_are_refused(norm):
    spec = nlc.NonLocalSpec(channels=3, norm=norm)
    params = nlc.init_params(spec, np.random.default_rng(0))
    with pytest.raises(
        ValueError, match=exactly(f"`spec` must have norm 'batch' to have statistics. Got norm {norm!r}.")
    ):
        nlc.updated_statistics(np.ones((1, 4, 3)), params, spec)


NAMES = list(nlc.param_shapes(nlc.NonLocalSpec(channels=3, norm="batch")))

BLOCKS = {
    "block": nlc.nonlocal_block,
    "attention": nlc.attention,
    "statistics": nlc.updated_statistics,
    "gradients": lambda x, params, spec, **options: nlc.nonlocal_block_vjp(
        x, params, spec, np.ones((2, 4, 3)), **options
    ),
}


@pytest.mark.parametrize("call", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"spec": "official"}, TypeError, "`spec` must be a NonLocalSpec. Got 'official' of type str."),
        ({"x": np.ones((2, 4, 3), int)}, TypeError, "`x` must have a floating-point dtype. Got int64."),
        ({"x": np.ones((2, 4, 5))}, ValueError, "`x` must have 3 channels. Got 5 channels."),
        ({"params": [1]}, TypeError, "`params` must be a mapping from names to arrays. Got [1] of type list."),
        ({"params": {}}, ValueError, f"`params` must hold exactly {NAMES}. Got missing {sorted(NAMES)}, unknown []."),
        ({"key_mask": True}, TypeError, "`key_mask` must be an array. Got bool."),
        ({"key_mask": np.ones((2, 4), int)}, TypeError, "`key_mask` must be boolean. Got int64."),
        (
            {"key_mask": np.ones((2, 5), bool)},
            ValueError,
            "`key_mask` must have shape (2, 4). Got shape (2, 5).",
        ),
    ],
)
def test_wrong_arguments_of_a_block_are_named(call, change, error, message):
    spec = nlc.NonLocalSpec(channels=3, norm="batch")
    given = {"x": np.ones((2, 4, 3)), "params": nlc.init_params(spec, np.random.default_rng(0)), "spec": spec}
    with pytest.raises(error, match=exactly(message)):
        call(**{**given, **change})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (nlc.nonlocal_block, "`x` must be an array. Got list."),
        (nlc.attention, "`x` must be an array. Got list."),
        (nlc.updated_statistics, "`x` must be an array. Got list."),
        (BLOCKS["gradients"], "`x` must be a NumPy array. Got [1.0] of type list."),
    ],
    ids=BLOCKS,
)
def test_an_input_that_is_no_array_is_named(call, message):
    spec = nlc.NonLocalSpec(channels=3, norm="batch")
    with pytest.raises(TypeError, match=exactly(message)):
        call([1.0], nlc.init_params(spec, np.random.default_rng(0)), spec)


WRONG = ["x", None, 1, [], 1.0, np.ones(3)]
"""What is no bool."""


@pytest.mark.parametrize("value", WRONG, ids=repr)
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (nlc.nonlocal_block, "training"),
        (BLOCKS["gradients"], "training"),
        (nlc.updated_statistics, "unbiased"),
    ],
    ids=["block", "gradients", "statistics"],
)
def test_what_is_to_be_true_or_false_is_no_other_value(call, name, value):
    spec = nlc.NonLocalSpec(channels=3, norm="batch")
    params = nlc.init_params(spec, np.random.default_rng(0))
    with pytest.raises(TypeError, match=f"^`{name}` must be a bool. Got "):
        call(np.ones((2, 4, 3)), params, spec, **{name: value})


@pytest.mark.parametrize(
    "call",
    [
        nlc.param_shapes,
        lambda spec: nlc.init_params(spec, np.random.default_rng(0)),
        lambda spec: nlc.fold_norm({}, spec),
    ],
    ids=["shapes", "new", "folded"],
)
def test_a_spec_is_no_other_value(call):
    with pytest.raises(TypeError, match=exactly("`spec` must be a NonLocalSpec. Got 'official' of type str.")):
        call("official")


def test_arrays_of_several_libraries_are_refused_by_name():
    spec, x = nlc.NonLocalSpec(channels=3), np.ones((2, 4, 3))
    params = nlc.init_params(spec, np.random.default_rng(0))
    other = {**params, "g.bias": torch.zeros(1, dtype=torch.float64)}
    with pytest.raises(
        TypeError,
        match=exactly("`params['g.bias']` must be an array of the same library as `x`. Got shape (1,) of type Tensor."),
    ):
        nlc.nonlocal_block(x, other, spec)
    with pytest.raises(TypeError, match=r"^`phi` must be an array of the same library as `theta`\."):
        nlc.nonlocal_op(x, torch.ones(2, 4, 3), x)


@pytest.mark.parametrize("call", [nlc.nonlocal_block, BLOCKS["gradients"]], ids=["block", "gradients"])
def test_a_method_that_does_not_serve_the_form_is_refused(call):
    spec = nlc.NonLocalSpec(channels=3)
    message = "`method` must be 'auto', 'pairwise' or 'streamed' for the form 'embedded_gaussian'. Got 'sorted'."
    with pytest.raises(ValueError, match=exactly(message)):
        call(np.ones((2, 4, 3)), nlc.init_params(spec, np.random.default_rng(0)), spec, method="sorted")


@pytest.mark.parametrize("positions", [[4], [0, -1]])
def test_positions_outside_the_grid_are_refused(positions):
    spec = nlc.NonLocalSpec(channels=3)
    params = nlc.init_params(spec, np.random.default_rng(0))
    message = f"`positions` must be flat indices from 0 to 3. Got {positions}."
    with pytest.raises(ValueError, match=exactly(message)):
        nlc.attention(np.ones((2, 4, 3)), params, spec, positions)


@pytest.mark.parametrize("name", ["theta", "phi", "g"])
def test_the_operands_must_be_arrays_of_the_standard(name):
    given = {"theta": np.ones((1, 2, 4)), "phi": np.ones((1, 3, 4)), "g": np.ones((1, 3, 4))}
    with pytest.raises(TypeError, match=exactly(f"`{name}` must be an array. Got list.")):
        nlc.nonlocal_op(**{**given, name: [1.0]})
    message = (
        f"`{name}` must be an array of a library that follows the array API standard. "
        f"Got shape {given[name].shape} of type SimpleNamespace."
    )
    with pytest.raises(TypeError, match=exactly(message)):
        nlc.nonlocal_op(**{**given, name: SimpleNamespace(dtype=given[name].dtype, shape=given[name].shape)})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dy": np.ones((1, 2, 3))}, ValueError, "`dy` must have shape (1, 2, 1). Got shape (1, 2, 3)."),
        ({"theta": [1.0]}, TypeError, "`theta` must be a NumPy array. Got [1.0] of type list."),
        ({"phi": [1.0]}, TypeError, "`phi` must be a NumPy array. Got [1.0] of type list."),
        ({"g": [1.0]}, TypeError, "`g` must be a NumPy array. Got [1.0] of type list."),
        ({"dy": [1.0]}, TypeError, "`dy` must be a NumPy array. Got [1.0] of type list."),
        (
            {"normalize": "softmax"},
            ValueError,
            "`normalize` must be None for the named form 'embedded_gaussian', which fixes it. Got 'softmax'.",
        ),
        (
            {"method": "sorted"},
            ValueError,
            "`method` must be 'auto', 'pairwise' or 'streamed' for the form 'embedded_gaussian'. Got 'sorted'.",
        ),
    ],
)
def test_wrong_arguments_of_a_gradient_are_named(change, error, message):
    given = {"theta": np.ones((1, 2, 4)), "phi": np.ones((1, 3, 4)), "g": np.ones((1, 3, 1)), "dy": np.ones((1, 2, 1))}
    with pytest.raises(error, match=exactly(message)):
        nlc.nonlocal_op_vjp(**{**given, **change})


def test_a_function_has_no_gradients():
    options = {"pairwise": relu_of_product, "normalize": "count"}
    spec, x = nlc.NonLocalSpec(channels=3, **options), np.ones((2, 4, 3))
    message = f"`pairwise` must be one of the named forms to have NumPy gradients. Got {relu_of_product}."
    with pytest.raises(ValueError, match=exactly(message)):
        nlc.nonlocal_op_vjp(x, x, x, x, **options)
    with pytest.raises(ValueError, match=exactly(message)):
        nlc.nonlocal_block_vjp(x, nlc.init_params(spec, np.random.default_rng(0)), spec, x)


def test_the_gradient_of_a_block_must_have_its_shape():
    spec = nlc.NonLocalSpec(channels=3)
    x, params = np.ones((2, 4, 3)), nlc.init_params(spec, np.random.default_rng(0))
    with pytest.raises(ValueError, match=exactly("`dz` must have shape (2, 4, 3). Got shape (1, 4, 3).")):
        nlc.nonlocal_block_vjp(x, params, spec, x[:1])
    with pytest.raises(TypeError, match=exactly("`dz` must be a NumPy array. Got [1.0] of type list.")):
        nlc.nonlocal_block_vjp(x, params, spec, [1.0])


def test_an_operation_without_queries_gives_none_and_one_without_keys_is_refused():
    theta, phi, g = np.ones((2, 0, 4)), np.ones((2, 3, 4)), np.ones((2, 3, 5))
    assert nlc.nonlocal_op(theta, phi, g).shape == (2, 0, 5)
    assert nlc.nonlocal_op_vjp(theta, phi, g, np.ones((2, 0, 5)))["phi"].shape == phi.shape
    with pytest.raises(ValueError, match=exactly("`phi` must have at least one key. Got shape (2, 0, 4).")):
        nlc.nonlocal_op(phi, phi[:, :0], g[:, :0])


@pytest.mark.parametrize("positions", [[], (), range(0), np.array([], int)], ids=["list", "tuple", "range", "array"])
def test_no_positions_give_no_rows(positions):
    spec = nlc.NonLocalSpec(channels=3)
    params = nlc.init_params(spec, np.random.default_rng(0))
    assert nlc.attention(np.ones((2, 4, 3)), params, spec, positions).shape == (2, 0, 4)
