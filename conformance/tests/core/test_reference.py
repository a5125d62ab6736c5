"""The reference against the formulas, written out once more as loops over single positions."""

import itertools
import math

import numpy as np
import pytest

import nonlocal_core as nlc
from nonlocal_conformance import CASES
from nonlocal_core.reference import operation
from nonlocal_core.reference.operation import query_chunks
from nonlocal_core.spec.form import Form


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
    if callable(spec.pairwise):
        return max((theta + 1.0) @ phi, 0.0)
    if spec.pairwise == "concatenation":
        return max(params["concat.weight"] @ np.concatenate([theta, phi]) + params.get("concat.bias", 0.0), 0.0)
    return theta @ phi


def gathered(x, valid, params, spec):
    """Return y_i for every position of one sample."""
    scale = {None: 1.0, "inner": spec.inner_channels**-0.5, "input": spec.channels**-0.5}.get(spec.scale, spec.scale)
    keys, y = keys_of_sample(x, valid, params, spec), np.zeros((*x.shape[:-1], spec.inner_channels))
    softmax = spec.normalize == "softmax" or spec.pairwise in {"gaussian", "embedded_gaussian"}
    for query in np.ndindex(x.shape[:-1]):
        theta = x[query] if spec.pairwise == "gaussian" else project(x[query], params, "theta")
        mine = [(scale * score(theta, phi, params, spec), g) for phi, g, at in keys if interacts(spec, query, at)]
        if not mine:
            continue
        weights = [math.exp(s) if softmax else s for s, _ in mine]
        total = sum(weights) if softmax else len(mine)
        y[query] = sum(w * g for w, (_, g) in zip(weights, mine, strict=True)) / total
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
        if spec.norm == "batch" and training:
            everywhere = tuple(range(x.ndim - 1))
            mean, variance = r.mean(axis=everywhere), r.var(axis=everywhere)
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


@pytest.mark.parametrize("unbiased", [False, True])
def test_the_running_statistics_move_by_the_momentum_towards_those_of_the_branch(unbiased):
    case = CASES["embedded_gaussian_training"]
    data, params = case.data(), case.data().params
    # With a norm that does nothing and no residual, the output is the branch before the norm.
    plain = {name: a for name, a in params.items() if not name.startswith("norm.")}
    branch = by_loops(data.x, plain, case.spec.replace(norm=None, residual=False), None, training=False)
    moved = nlc.updated_statistics(data.x, params, case.spec, unbiased=unbiased)
    mean, variance = branch.mean(axis=(0, 1, 2)), branch.var(axis=(0, 1, 2), ddof=int(unbiased))
    np.testing.assert_allclose(moved["norm.mean"], 0.7 * params["norm.mean"] + 0.3 * mean, rtol=1e-12)
    np.testing.assert_allclose(moved["norm.variance"], 0.7 * params["norm.variance"] + 0.3 * variance, rtol=1e-12)


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
    with pytest.raises(ValueError, match="`x` must have more than one value per channel in training"):
        call(*given, training=True)
    call(*given)


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
    monkeypatch.setattr(operation, "CHUNK", 200)
    scale = max(np.abs(value).max() for value in whole.values())
    for key, value in results().items():
        np.testing.assert_allclose(value, whole[key], rtol=0, atol=1e-13 * scale)


def test_a_function_gets_its_queries_whole(monkeypatch):
    sizes = []

    def scores(theta, phi):
        sizes.append(theta.shape[1])
        return theta @ phi.mT

    monkeypatch.setattr(operation, "CHUNK", 1)
    theta = np.ones((2, 5, 3))
    nlc.nonlocal_op(theta, theta, theta, pairwise=scores, normalize="softmax")
    nlc.nonlocal_op(theta, theta, theta)
    assert sizes == [5]


def test_chunks_of_queries_hold_no_more_weights_than_they_may(monkeypatch):
    monkeypatch.setattr(operation, "CHUNK", 40)
    form = Form("dot_product", softmax=False, scale=1.0)
    chunks = list(query_chunks(np.ones((2, 9, 3)), np.ones((2, 5, 3)), form))
    assert [(rows.start, rows.stop) for rows in chunks] == [(0, 4), (4, 8), (8, 9)]
    monkeypatch.setattr(operation, "CHUNK", 1)
    assert len(list(query_chunks(np.ones((2, 9, 3)), np.ones((2, 5, 3)), form))) == 9


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


def test_statistics_without_a_batch_norm_are_refused():
    spec = nlc.NonLocalSpec(channels=3)
    params = nlc.init_params(spec, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"`spec` must have norm 'batch' to have statistics\. Got norm None"):
        nlc.updated_statistics(np.ones((1, 4, 3)), params, spec)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": [1.0]}, TypeError, "`x` must be an array"),
        ({"spec": "official"}, TypeError, "`spec` must be a NonLocalSpec"),
        ({"params": [1]}, TypeError, "`params` must be a mapping from names to arrays"),
        ({"params": {}}, ValueError, "`params` must hold exactly .* missing .*'g.bias'"),
        ({"key_mask": np.ones((2, 4), int)}, TypeError, "`key_mask` must be boolean. Got int64"),
    ],
)
def test_wrong_arguments_of_a_block_are_named(change, error, words):
    spec = nlc.NonLocalSpec(channels=3)
    given = {"x": np.ones((2, 4, 3)), "params": nlc.init_params(spec, np.random.default_rng(0)), "spec": spec}
    with pytest.raises(error, match=words):
        nlc.nonlocal_block(**{**given, **change})


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"dy": np.ones((1, 2, 3))}, ValueError, r"`dy` must have shape \(1, 2, 1\). Got shape \(1, 2, 3\)"),
        ({"dy": [1.0]}, TypeError, "`dy` must be a NumPy array"),
        (
            {"pairwise": lambda a, b: a @ b.mT, "normalize": "count"},
            ValueError,
            "`pairwise` must be one of the named forms to have NumPy gradients",
        ),
    ],
)
def test_wrong_arguments_of_a_gradient_are_named(change, error, words):
    given = {"theta": np.ones((1, 2, 4)), "phi": np.ones((1, 3, 4)), "g": np.ones((1, 3, 1)), "dy": np.ones((1, 2, 1))}
    with pytest.raises(error, match=words):
        nlc.nonlocal_op_vjp(**{**given, **change})


def test_the_gradient_of_a_block_must_have_its_shape():
    spec = nlc.NonLocalSpec(channels=3)
    x, params = np.ones((2, 4, 3)), nlc.init_params(spec, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"`dz` must have shape \(2, 4, 3\)"):
        nlc.nonlocal_block_vjp(x, params, spec, x[:1])


def test_an_operation_without_queries_gives_none_and_one_without_keys_is_refused():
    theta, phi, g = np.ones((2, 0, 4)), np.ones((2, 3, 4)), np.ones((2, 3, 5))
    assert nlc.nonlocal_op(theta, phi, g).shape == (2, 0, 5)
    assert nlc.nonlocal_op_vjp(theta, phi, g, np.ones((2, 0, 5)))["phi"].shape == phi.shape
    with pytest.raises(ValueError, match="`phi` must have at least one key"):
        nlc.nonlocal_op(phi, phi[:, :0], g[:, :0])


@pytest.mark.parametrize("positions", [[], (), range(0), np.array([], int)], ids=["list", "tuple", "range", "array"])
def test_no_positions_give_no_rows(positions):
    spec = nlc.NonLocalSpec(channels=3)
    params = nlc.init_params(spec, np.random.default_rng(0))
    assert nlc.attention(np.ones((2, 4, 3)), params, spec, positions).shape == (2, 0, 4)
