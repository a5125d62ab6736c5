"""Files of other implementations: found, read with the numbers of their formulas, written, and what is refused."""

import re
import time
import warnings

import ml_dtypes
import numpy as np
import pytest

from nonlocal_core import NonLocalSpec, init_params, nonlocal_block, param_shapes
from nonlocal_core.files.peers import AssumedOptionsWarning, find_peer_blocks, from_peer, to_peer
from nonlocal_core.spec.presets import PRESETS

E, G, D, C = "embedded_gaussian", "gaussian", "dot_product", "concatenation"
CHANNELS, INNER = 7, 3
SIZES = {1: (7,), 2: (5, 6), 3: (8, 3, 5)}
PLACE = "stage.1.block"
BIAS = {"theta": True, "phi": True, "g": True, "out": False}


def torch_keys(*, norm="", concat_bias=False, **layers):
    """Return the keys of PyTorch modules by canonical names; a layer whose name ends in "!" has no bias."""
    keys = {}
    for layer, name in layers.items():
        keys[f"{layer}.weight"] = f"{name.rstrip('!')}.weight"
        if not name.endswith("!") and (layer != "concat" or concat_bias):
            keys[f"{layer}.bias"] = f"{name}.bias"
    if norm:
        keys |= {f"norm.{a}": f"{norm}.{b}" for a, b in (("weight", "weight"), ("bias", "bias"))}
        keys |= {f"norm.{a}": f"{norm}.{b}" for a, b in (("mean", "running_mean"), ("variance", "running_var"))}
    return keys


def caffe2_keys(*, norm):
    """Return the names of blobs by canonical names; `norm` lists the parameters of the norm that there are."""
    keys = {f"{layer}.{a}": f"{layer}_{b}" for layer in ("theta", "phi", "g", "out") for a, b in WEIGHT_BIAS}
    blobs = {"weight": "bn_s", "bias": "bn_b", "mean": "bn_rm", "variance": "bn_riv"}
    return keys | {f"norm.{name}": blobs[name] for name in norm.split()}


WEIGHT_BIAS = (("weight", "w"), ("bias", "b"))
BATCH = "weight bias mean variance"
VIDEO = {"theta": "conv_theta", "phi": "conv_phi", "g": "conv_g", "out": "conv_out"}
PLAIN = {"theta": "theta", "phi": "phi", "g": "g"}
POOLED = {"theta": "theta", "phi": "phi.0", "g": "g.0"}
CONV = {"theta": "theta.conv", "phi": "phi.conv", "g": "g.conv", "out": "conv_out.conv"}
CONV_POOLED = CONV | {"phi": "phi.0.conv", "g": "g.0.conv"}
CONV_NORM = {"out": "conv_out.conv!", "norm": "conv_out.bn"}

# Peer, rank, form, keys; factor of the scores, window, whether it pools the input.
ROWS = {
    "official": ("official", 3, E, caffe2_keys(norm=BATCH), INNER**-0.5, (1, 2, 2), True),
    "official dot": ("official", 3, D, caffe2_keys(norm=BATCH), 1, (1, 2, 2), True),
    "official frozen": ("official_affine", 3, E, caffe2_keys(norm="weight bias"), INNER**-0.5, (1, 2, 2), True),
    "official affine": ("official_affine", 3, E, caffe2_keys(norm=""), INNER**-0.5, (1, 2, 2), True),
    "slowfast": ("slowfast", 3, E, torch_keys(**VIDEO, norm="bn"), INNER**-0.5, (1, 2, 2), True),
    "slowfast dot": ("slowfast", 3, D, torch_keys(**VIDEO, norm="bn"), 1, (1, 2, 2), True),
    "pytorchvideo": ("pytorchvideo", 3, E, torch_keys(**VIDEO, norm="norm"), INNER**-0.5, None, True),
    "pytorchvideo dot": ("pytorchvideo", 3, D, torch_keys(**VIDEO), 1, None, True),
    "mmcv 1d": ("mmcv", 1, E, torch_keys(**CONV), INNER**-0.5, None, False),
    "mmcv pooled": ("mmcv", 2, E, torch_keys(**CONV_POOLED), INNER**-0.5, (2, 2), False),
    "mmcv norm": ("mmcv", 2, E, torch_keys(**{**CONV, **CONV_NORM}), INNER**-0.5, None, False),
    "mmcv both": ("mmcv", 3, D, torch_keys(**{**CONV_POOLED, **CONV_NORM}), 1, (1, 2, 2), False),
    "mmcv gaussian": ("mmcv", 2, G, torch_keys(g="g.0.conv", out="conv_out.conv"), 1, (2, 2), False),
    "mmcv concat": ("mmcv", 2, C, torch_keys(**CONV, concat="concat_project.conv"), 1, None, False),
    "mmdet2019": ("mmdet2019", 2, E, torch_keys(**CONV), INNER**0.5, None, False),
    "mmdet2019 norm": ("mmdet2019", 2, D, torch_keys(**{**CONV, **CONV_NORM}), 1, None, False),
    "alexhex7": ("alexhex7", 1, E, torch_keys(**POOLED, out="W.0", norm="W.1"), 1, (2,), False),
    "alexhex7 unpooled": ("alexhex7", 2, D, torch_keys(**PLAIN, out="W.0", norm="W.1"), 1, None, False),
    "alexhex7 no norm": ("alexhex7", 3, E, torch_keys(**POOLED, out="W"), 1, (1, 2, 2), False),
    "alexhex7 gaussian": ("alexhex7", 2, G, torch_keys(g="g.0", out="W.0", norm="W.1"), 1, (2, 2), False),
    "alexhex7 bare gaussian": ("alexhex7", 3, G, torch_keys(g="g", out="W"), 1, None, False),
    "alexhex7 concat": ("alexhex7", 2, C, torch_keys(**POOLED, concat="concat_project.0", out="W"), 1, (2, 2), False),
    "tea1528": ("tea1528", 2, E, torch_keys(**PLAIN, out="W_z.0", norm="W_z.1"), 1, None, False),
    "tea1528 no norm": ("tea1528", 1, D, torch_keys(**PLAIN, out="W_z"), 1, None, False),
    "tea1528 gaussian": ("tea1528", 3, G, torch_keys(g="g", out="W_z.0", norm="W_z.1"), 1, None, False),
    "tea1528 concat": (
        "tea1528",
        3,
        C,
        torch_keys(**PLAIN, concat="W_f.0", concat_bias=True, out="W_z.0", norm="W_z.1"),
        1,
        None,
        False,
    ),
    "timm": ("timm", 2, E, torch_keys(theta="t", phi="p", g="g", out="z", norm="norm"), CHANNELS**-0.5, None, False),
    "gluon": ("gluon", 3, E, torch_keys(**PLAIN, out="W_bn.0", norm="W_bn.1"), INNER**-0.5, None, False),
    "gluon pooled": (
        "gluon",
        3,
        E,
        torch_keys(theta="theta", phi="sub_phi.0", g="sub_g.0", out="W_bn.0", norm="W_bn.1"),
        INNER**-0.5,
        (1, 2, 2),
        False,
    ),
    "gluon no norm": ("gluon", 2, E, torch_keys(**PLAIN, out="W"), INNER**-0.5, None, False),
    "keras": ("keras_nonlocal", 2, E, {f"{name}.weight": name for name in (*PLAIN, "out")}, 1, (1, 2), False),
    "keras dot": ("keras_nonlocal", 3, D, {f"{name}.weight": name for name in (*PLAIN, "out")}, 1, None, False),
    "keras gaussian": ("keras_nonlocal", 1, G, {"g.weight": "g", "out.weight": "out"}, 1, None, False),
}
FOUND_AS = {"mmdet2019": "mmcv", "mmdet2019 norm": "mmcv", "gluon no norm": "alexhex7"}
"""The rows whose keys are also those of another implementation, which is found."""

DOUBLE = {"sub_phi.0": "phi", "sub_g.0": "g", "W_bn.0": "W", "W_bn.1": "bn"}
"""What gluon's files hold twice."""


def values(names, seed=0):
    """Return parameters of the given canonical names; none is zero, and variances are positive."""
    rng = np.random.default_rng(seed)
    weight = {"out": (CHANNELS, INNER), "concat": (2 * INNER,), "norm": (CHANNELS,)}
    shapes = {name: weight.get(name.partition(".")[0], (INNER, CHANNELS)) for name in names}
    shapes = {name: shape if name[-6:] == "weight" else shape[:1] for name, shape in shapes.items()}
    shapes |= {"concat.bias": ()} if "concat.bias" in shapes else {}
    return {name: rng.normal(size=shape) ** (2 if name == "norm.variance" else 1) for name, shape in shapes.items()}


def in_file(peer, rank, keys, params, place=PLACE):
    """Return a file of one block, as the implementation would have written it."""
    file, ones, separator = {}, (1,) * rank, "_" if peer.startswith("official") else "."
    for name, array in params.items():
        if name == "concat.weight":
            shaped = array.reshape((1, 2 * INNER, 1, 1))
        elif name == "concat.bias":
            shaped = array.reshape(1)
        elif peer == "keras_nonlocal":
            shaped = array.T.reshape((*ones, *array.T.shape))
        else:
            shaped = array.reshape((*array.shape, *ones)) if array.ndim == 2 else array
        file[f"{place}{separator}{keys[name]}"] = shaped
    if peer == "gluon":
        twins = {
            key.replace(long, short): a for key, a in file.items() for long, short in DOUBLE.items() if long in key
        }
        file |= twins
    for norm in {key.rpartition(".")[0] for key in file if key.endswith("running_mean")}:
        file[f"{norm}.num_batches_tracked"] = np.array(5)
    if peer.startswith("official"):
        file |= {f"{key}_momentum": np.ones(3) for key in list(file)} | {"lr": np.array(0.1), "model_iter": 7}
    return file


def pool(x, window):
    """Return the maxima `(S1..Sk, C)` of windows."""
    for axis, size in enumerate(window):
        keep = x.shape[axis] // size
        x = (
            np.take(x, range(keep * size), axis)
            .reshape(*x.shape[:axis], keep, size, *x.shape[axis + 1 :])
            .max(axis + 1)
        )
    return x


def formula(x, params, form, factor, window, at_input, epsilon=0.0):
    """Return the block of one clip `(S1..Sk, C)`, written directly."""

    def project(layer, a):
        return a @ params[f"{layer}.weight"].T + params.get(f"{layer}.bias", 0.0)

    def keys(layer):
        if window is None:
            return project(layer, x)
        return project(layer, pool(x, window)) if at_input else pool(project(layer, x), window)

    g = keys("g").reshape(-1, INNER)
    if form == G:
        theta, phi = x.reshape(-1, CHANNELS), (x if window is None else pool(x, window)).reshape(-1, CHANNELS)
    else:
        theta, phi = project("theta", x).reshape(-1, INNER), keys("phi").reshape(-1, INNER)
    if form == C:
        halves = params["concat.weight"][:INNER], params["concat.weight"][INNER:]
        scores = np.maximum((theta @ halves[0])[:, None] + phi @ halves[1] + params.get("concat.bias", 0.0), 0)
    else:
        scores = factor * theta @ phi.T
    if form in {E, G}:
        weights = np.exp(scores - scores.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
    else:
        weights = scores / len(phi)
    r = project("out", weights @ g)
    if "norm.mean" in params:
        r = (r - params["norm.mean"]) / np.sqrt(params["norm.variance"] + epsilon)
    if "norm.weight" in params:
        r = r * params["norm.weight"] + params["norm.bias"]
    return x + r.reshape(x.shape)


def quietly(*arguments, **options):
    """Call `from_peer` without its warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AssumedOptionsWarning)
        return from_peer(*arguments, **options)


def read(row, **options):
    """Return the parameters and the file of a row, and what is read from the file."""
    peer, rank, form, keys, *_ = ROWS[row]
    params = values(keys)
    file = in_file(peer, rank, keys, params)
    return params, file, *quietly(file, peer=peer, prefix=PLACE, pairwise=form, **options)


rows = pytest.mark.parametrize("row", ROWS)


# Reading


@rows
def test_a_block_is_read_with_the_parameters_of_the_file(row):
    params, _, found, spec = read(row)
    assert list(found) == list(param_shapes(spec))
    assert found.keys() == params.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, params[name], strict=True)


@rows
def test_what_is_read_computes_the_formula_of_the_implementation(row):
    peer, rank, form, _, factor, window, at_input = ROWS[row]
    params, _, found, spec = read(row)
    x = np.random.default_rng(1).normal(size=(*SIZES[rank], CHANNELS))
    expected = formula(x, params, form, factor, window, at_input, PRESETS[peer].norm_epsilon)
    np.testing.assert_allclose(nonlocal_block(x[None], found, spec)[0], expected, rtol=1e-12, atol=1e-12)


@rows
def test_a_block_is_found(row):
    peer, rank, _, keys, *_ = ROWS[row]
    file = in_file(peer, rank, keys, values(keys)) | {"stage.1.conv.weight": np.ones((2, 2)), "fc.bias": np.ones(2)}
    assert find_peer_blocks(file) == [(PLACE, FOUND_AS.get(row, peer))]


@rows
def test_a_block_of_its_own_has_no_prefix(row):
    peer, rank, form, keys, *_ = ROWS[row]
    params = values(keys)
    separator = "_" if peer.startswith("official") else "."
    file = {key.removeprefix(PLACE + separator): a for key, a in in_file(peer, rank, keys, params).items()}
    file = {key: a for key, a in file.items() if key not in {"lr", "model_iter"}}
    assert find_peer_blocks(file) == [("", FOUND_AS.get(row, peer))]
    np.testing.assert_array_equal(quietly(file, peer=peer, pairwise=form)[0]["out.weight"], params["out.weight"])


def test_every_preset_is_among_the_rows():
    assert {row[0] for row in ROWS.values()} == set(PRESETS)


@pytest.mark.parametrize("prefix", [PLACE, f"{PLACE}.", f"module.{PLACE}", f"module.{PLACE}."])
def test_the_prefix_of_data_parallel_and_the_last_dot_may_be_left_out(prefix):
    params, file, *_ = read("alexhex7")
    file = {f"module.{key}": array for key, array in file.items()}
    assert find_peer_blocks(file) == [(f"module.{PLACE}", "alexhex7")]
    found, _ = quietly(file, peer="alexhex7", prefix=prefix)
    np.testing.assert_array_equal(found["g.weight"], params["g.weight"])


def test_the_prefix_of_data_parallel_stays_where_another_name_lacks_it():
    _, file, *_ = read("alexhex7")
    file = {f"module.{key}": array for key, array in file.items()} | {"epoch": np.ones(1)}
    with pytest.raises(ValueError, match=rf"blocks found: 'module\.{re.escape(PLACE)}' \(alexhex7\)\.$"):
        from_peer(file, peer="alexhex7", prefix=PLACE)


def test_all_blocks_are_found_in_the_order_of_the_file():
    names = {"module.layer3.0.nl": "alexhex7", "module.layer2.2.nl": "timm", "module.refine": "mmcv"}
    file = {}
    for (place, peer), seed in zip(names.items(), range(3), strict=True):
        _, rank, _, keys, *_ = ROWS["mmcv pooled" if peer == "mmcv" else peer]
        file |= in_file(peer, rank, keys, values(keys, seed), place)
    assert find_peer_blocks(file) == list(names.items())
    second, _ = quietly(file, peer="timm", prefix="module.layer2.2.nl")
    np.testing.assert_array_equal(second["g.bias"], values(ROWS["timm"][3], 1)["g.bias"])


def test_nothing_is_found_where_there_is_nothing():
    assert find_peer_blocks({"conv1.weight": np.ones((2, 2)), "out.weight": np.ones((2, 2))}) == []


@pytest.mark.parametrize(
    ("names", "blocks"),
    [
        ([f"b{i}.{layer}.weight" for i in range(1500) for layer in ("theta", "phi", "g", "W")], 1500),
        ([f"b{i}.W.weight" for i in range(3000)], 0),
        ([f"b{i}.{rest}" for i in range(3000) for rest in ("W.weight", "W.num_batches_tracked")], 0),
        ([".".join(["b"] * depth) + ".W.weight" for depth in range(1500)], 0),
    ],
    ids=["blocks", "last layers", "ignored", "nested"],
)
def test_the_time_of_a_look_for_blocks_grows_with_the_number_of_keys_alone(names, blocks):
    start = time.perf_counter()
    assert len(find_peer_blocks(dict.fromkeys(names))) == blocks
    assert time.perf_counter() - start < 8


@pytest.mark.parametrize(
    ("place", "frames"),
    [
        ("nonlocal_conv3_1", 4),
        ("my_net_nonlocal_conv3_1", 4),
        ("nonlocal_conv4_3", None),
        ("my_conv3d_net_nonlocal_conv4_1", None),
        ("my_conv3_net_nonlocal_conv4_1", None),
    ],
)
def test_the_nets_for_long_clips_have_groups_of_four_frames_in_res3(place, frames):
    _, rank, _, keys, *_ = ROWS["official affine"]
    params = values(keys)
    found, spec = quietly(in_file("official_affine", rank, keys, params, place), peer="official_affine", prefix=place)
    assert (spec.group_size, spec.norm) == (frames, None)
    x = np.random.default_rng(1).normal(size=(*SIZES[3], CHANNELS))
    sets = x.reshape(-1, 4 if frames else 8, *x.shape[1:])
    expected = np.concatenate([formula(one, params, E, INNER**-0.5, (1, 2, 2), at_input=True) for one in sets])
    np.testing.assert_allclose(nonlocal_block(x[None], found, spec)[0], expected, rtol=1e-12, atol=1e-12)


def test_biases_that_the_file_lacks_are_biases_that_the_block_lacks():
    _, file, _, spec = read("mmcv norm")
    assert spec.bias == BIAS
    bare = {key: array for key, array in file.items() if ".conv.bias" not in key}
    params, spec = quietly(bare, peer="mmcv", prefix=PLACE)
    assert spec.bias == dict.fromkeys(BIAS, False)
    assert "theta.bias" not in params


# What the file does not say


ASSUMED = [
    ("official", {}, f"pairwise={E!r}, scale='inner', subsample=(1, 2, 2), subsample_at='input', group_size=None, "),
    ("official dot", {"pairwise": D}, "scale=None, subsample=(1, 2, 2), subsample_at='input', group_size=None, "),
    ("slowfast", {"pairwise": E, "group_size": None, "subsample": None}, "scale='inner', norm_epsilon=1e-05. "),
    ("mmcv pooled", {"pairwise": D, "scale": None}, "subsample_at='projection'. "),
    ("mmcv gaussian", {"subsample_at": "input"}, "scale=None. "),
    ("alexhex7 unpooled", {"scale": "inner"}, f"pairwise={E!r}, norm_epsilon=1e-05. "),
    ("timm", {"norm_epsilon": 1e-3}, "scale='input', subsample=None. "),
]


@pytest.mark.parametrize(("row", "options", "message"), ASSUMED, ids=[row for row, *_ in ASSUMED])
def test_one_warning_names_what_came_from_the_preset(row, options, message):
    peer, rank, _, keys, *_ = ROWS[row]
    file = in_file(peer, rank, keys, values(keys))
    start = f"the file does not say these options, which are those of the preset {peer!r}: {message}"
    with pytest.warns(AssumedOptionsWarning, match=f"^{re.escape(start)}") as caught:
        from_peer(file, peer=peer, prefix=PLACE, **options)
    assert [one.filename for one in caught] == [__file__]


ALL = {"pairwise": D, "scale": 0.5, "subsample": (2, 2, 2), "subsample_at": "projection", "group_size": 4}


def test_nothing_is_warned_of_if_all_is_given():
    peer, rank, _, keys, *_ = ROWS["slowfast"]
    file = in_file(peer, rank, keys, values(keys))
    _, spec = from_peer(file, peer=peer, prefix=PLACE, **ALL, norm_epsilon=0.5)
    assert {name: getattr(spec, name) for name in ALL} == ALL
    assert (spec.norm_epsilon, spec.inner_channels, spec.zero_init) == (0.5, INNER, False)


def test_keys_that_tell_of_pooling_leave_the_window_free():
    assert read("alexhex7 no norm", subsample=(2, 2, 2))[3].subsample == (2, 2, 2)


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ("mmcv norm", {"norm": None}, "`norm` must be 'batch' for this file. Got None."),
        ("official affine", {"norm": "batch"}, "`norm` must be None for this file. Got 'batch'."),
        ("mmcv 1d", {"inner_channels": 4}, "`inner_channels` must be 3 for this file. Got 4."),
        ("mmcv concat", {"pairwise": E}, "`pairwise` must be 'concatenation' for this file. Got 'embedded_gaussian'."),
        ("mmcv gaussian", {"pairwise": D}, "`pairwise` must be 'gaussian' for this file. Got 'dot_product'."),
        ("mmcv 1d", {"pairwise": G}, f"`pairwise` must be {E!r} or {D!r} for this file. Got 'gaussian'."),
        ("timm", {"pairwise": D}, f"`pairwise` must be {E!r} for this file. Got 'dot_product'."),
        ("mmcv pooled", {"subsample": None}, "`subsample` must be a window for this file. Got None."),
        ("mmcv norm", {"subsample": 2}, "`subsample` must be None for this file. Got 2."),
        (
            "mmcv norm",
            {"bias": True},
            f"`bias` must be {BIAS} for this file. Got {BIAS | {'out': True}}.",
        ),
    ],
)
def test_an_option_that_contradicts_the_file_is_refused(row, options, message):
    peer, rank, form, keys, *_ = ROWS[row]
    file = in_file(peer, rank, keys, values(keys))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        from_peer(file, peer=peer, prefix=PLACE, **{"pairwise": form, **options})


def test_an_option_that_agrees_with_the_file_may_be_given():
    options = {"norm": "batch", "inner_channels": INNER, "bias": {"out": False}, "subsample": (2, 2, 2)}
    assert read("mmcv both", **options)[3].subsample == (2, 2, 2)


@pytest.mark.parametrize("option", ["heads", "channels"])
def test_an_unknown_option_is_a_type_error(option):
    _, file, *_ = read("timm")
    with pytest.raises(TypeError, match=f"^`{option}` must be an option of from_peer. Got an unknown one"):
        from_peer(file, peer="timm", prefix=PLACE, **{option: 2})


# Names that two implementations share


@pytest.mark.parametrize(
    ("row", "peer", "factor"),
    [
        ("mmcv norm", "mmdet2019", INNER**0.5),
        ("gluon no norm", "alexhex7", 1.0),
        ("official", "official_affine", INNER**-0.5),
        ("official affine", "official", INNER**-0.5),
        ("pytorchvideo dot", "pytorchvideo", 1.0),
    ],
)
def test_a_block_can_be_read_under_the_other_name(row, peer, factor):
    _, rank, form, keys, *_ = ROWS[row]
    params = values(keys)
    found, spec = quietly(in_file(ROWS[row][0], rank, keys, params), peer=peer, prefix=PLACE, pairwise=form)
    assert spec.scale_factor == pytest.approx(factor, rel=1e-15)
    np.testing.assert_array_equal(found["phi.weight"], params["phi.weight"])


# Values


def test_what_a_file_holds_twice_must_be_equal():
    _, file, *_ = read("gluon")
    file[f"{PLACE}.bn.bias"] = file[f"{PLACE}.bn.bias"] + 1e-9
    message = (
        f"`state_dict['{PLACE}.bn.bias']` must equal state_dict['{PLACE}.W_bn.1.bias'], as 'gluon' writes it twice. "
        "Got other values."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        from_peer(file, peer="gluon", prefix=PLACE)


@pytest.mark.parametrize("gone", ["W_bn.", "W.", "bn."])
def test_one_of_two_equal_values_may_be_gone(gone):
    params, file, *_ = read("gluon")
    file = {key: a for key, a in file.items() if not key.removeprefix(f"{PLACE}.").startswith(gone)}
    found, _ = quietly(file, peer="gluon", prefix=PLACE)
    np.testing.assert_array_equal(found["norm.mean"], params["norm.mean"])
    np.testing.assert_array_equal(found["out.weight"], params["out.weight"])


class Tensor:
    """What PyTorch's tensors are to NumPy, without PyTorch."""

    def __init__(self, array, dtype, *, detached=False):
        self.array, self.dtype, self.detached = array, dtype, detached

    def detach(self):
        return Tensor(self.array, self.dtype, detached=True)

    def cpu(self):
        return self

    def float(self):
        return Tensor(self.array, "torch.float32", detached=self.detached)

    def __array__(self, dtype=None, copy=None):
        if not self.detached or self.dtype == "torch.bfloat16":
            message = "it requires gradients or NumPy has no such dtype"
            raise RuntimeError(message)
        return self.array.astype(self.dtype.removeprefix("torch."))


@pytest.mark.parametrize(
    ("convert", "dtype"),
    [
        (lambda a: a.astype(np.float16), "float16"),
        (lambda a: a.astype(np.float32), "float32"),
        (lambda a: a.astype(">f8"), "float64"),
        (np.asfortranarray, "float64"),
        (lambda a: a.astype(ml_dtypes.bfloat16), "float32"),
        (lambda a: Tensor(a, "torch.float64"), "float64"),
        (lambda a: Tensor(a, "torch.bfloat16"), "float32"),
    ],
    ids=["half", "single", "big-endian", "columns", "bfloat16", "tensor", "bfloat16 tensor"],
)
def test_values_may_be_arrays_of_any_library(convert, dtype):
    params, file, *_ = read("timm")
    file = {key: a if key.endswith("tracked") else convert(a) for key, a in file.items()}
    found, _ = quietly(file, peer="timm", prefix=PLACE)
    assert {(array.dtype.str[1:], array.flags.c_contiguous) for array in found.values()} == {
        (np.dtype(dtype).str[1:], True)
    }
    np.testing.assert_allclose(found["out.weight"], params["out.weight"], rtol=2**-8)


@rows
def test_values_are_copies(row):
    _, file, found, _ = read(row)
    assert not any(np.shares_memory(a, b) for a in found.values() for b in file.values() if isinstance(b, np.ndarray))


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (np.ones(7, int), "dtype int64"),
        (None, "dtype object"),
        ("text", "dtype <U4"),
        ([[1.0], [2.0, 3.0]], "[[1.0], [2.0, 3.0]] of type list"),
    ],
)
def test_a_value_that_is_no_array_of_floats_is_a_type_error(value, got):
    _, file, *_ = read("timm")
    file[f"{PLACE}.z.bias"] = value
    message = f"`state_dict['{PLACE}.z.bias']` must be an array of float16, float32, float64, bfloat16. Got {got}."
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        from_peer(file, peer="timm", prefix=PLACE)


@pytest.mark.parametrize(
    ("row", "key", "shape", "expected"),
    [
        ("timm", "t.weight", (3, 7, 3, 3), (3, 7, 1, 1)),
        ("timm", "g.weight", (3, 7, 1, 3), (3, 7, 1, 1)),
        ("timm", "p.weight", (3, 7, 1), (3, 7, 1, 1)),
        ("timm", "z.weight", (3, 7, 1, 1), (7, 3, 1, 1)),
        ("timm", "t.bias", (7,), (3,)),
        ("timm", "norm.running_var", (3,), (7,)),
        ("mmcv concat", "concat_project.conv.weight", (1, 3, 1, 1), (1, 6, 1, 1)),
        ("tea1528 concat", "W_f.0.bias", (), (1,)),
        ("keras", "theta", (3, 3, 7, 3), (1, 1, 7, 3)),
        ("keras", "out", (1, 1, 7, 3), (1, 1, 3, 7)),
    ],
)
def test_a_wrong_shape_is_refused(row, key, shape, expected):
    peer, rank, form, keys, *_ = ROWS[row]
    file = in_file(peer, rank, keys, values(keys)) | {f"{PLACE}.{key}": np.ones(shape)}
    message = f"`state_dict['{PLACE}.{key}']` must have shape {expected}. Got shape {shape}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        from_peer(file, peer=peer, prefix=PLACE, pairwise=form)


@pytest.mark.parametrize(
    ("row", "key", "shape", "axes"),
    [
        ("slowfast", "conv_g.weight", (3, 7, 1, 1), "3"),
        ("gluon no norm", "g.weight", (3, 7, 1), "2 or 3"),
        ("mmcv 1d", "g.conv.weight", (3, 7), "1 or 2 or 3"),
        ("mmcv 1d", "g.conv.weight", (), "1 or 2 or 3"),
    ],
)
def test_a_kernel_of_another_rank_is_refused(row, key, shape, axes):
    peer, rank, form, keys, *_ = ROWS[row]
    file = in_file(peer, rank, keys, values(keys)) | {f"{PLACE}.{key}": np.ones(shape)}
    message = (
        f"`state_dict['{PLACE}.{key}']` must have {axes} axes beside its channels for {peer!r}. Got shape {shape}."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        from_peer(file, peer=peer, prefix=PLACE, pairwise=form)


# Keys


@pytest.mark.parametrize(
    ("row", "old", "new", "got"),
    [
        ("slowfast", "conv_g.weight", "conv_g.wieght", "'conv_g.wieght' (near 'conv_g.weight')"),
        ("mmcv norm", "conv_out.bn.weight", "conv_out.gn.weight", "'conv_out.gn.weight' (near 'conv_out.bn.weight')"),
        ("alexhex7", "phi.0.weight", "phi.weight", "'phi.weight' (near 'phi.0.weight')"),
        ("tea1528", "theta.bias", "x", "'x'"),
    ],
)
def test_a_missing_and_an_unknown_key_are_named_with_a_near_one(row, old, new, got):
    peer, rank, _, keys, *_ = ROWS[row]
    file = in_file(peer, rank, keys, values(keys))
    file[f"{PLACE}.{new}"] = file.pop(f"{PLACE}.{old}")
    rule = f"`state_dict` must hold the keys of {peer!r} under {PLACE!r} and no others"
    message = f"{rule}. Got missing {old!r}, unknown {got}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        from_peer(file, peer=peer, prefix=PLACE)
    assert find_peer_blocks(file) == []


@pytest.mark.parametrize(
    ("row", "gone"),
    [
        ("slowfast", "bn.running_mean"),
        ("slowfast", "conv_theta.weight"),
        ("slowfast", "conv_phi.bias"),
        ("official", "bn_riv"),
        ("timm", "t.weight"),
        ("keras", "out"),
        ("mmcv gaussian", "conv_out.conv.weight"),
    ],
)
def test_a_missing_key_is_named(row, gone):
    peer, rank, _, keys, *_ = ROWS[row]
    separator = "_" if peer == "official" else "."
    file = in_file(peer, rank, keys, values(keys))
    del file[f"{PLACE}{separator}{gone}"]
    with pytest.raises(ValueError, match=rf"Got missing {re.escape(repr(gone))}, unknown none\.$"):
        from_peer(file, peer=peer, prefix=PLACE)


def test_a_slowfast_block_without_its_norm_misses_it():
    _, file, *_ = read("slowfast")
    file = {key: array for key, array in file.items() if ".bn." not in key}
    missing = "missing 'bn.weight', 'bn.bias', 'bn.running_mean', 'bn.running_var', unknown none"
    with pytest.raises(ValueError, match=rf"{missing}; these are the keys of 'pytorchvideo'\.$"):
        from_peer(file, peer="slowfast", prefix=PLACE)


def test_of_many_keys_some_are_named():
    _, file, *_ = read("timm")
    file |= {f"{PLACE}.more{index}": np.ones(2) for index in range(8)}
    with pytest.raises(ValueError, match=r"unknown 'more0', 'more1', 'more2', 'more3', 'more4', 3 more\.$"):
        from_peer(file, peer="timm", prefix=PLACE)


@pytest.mark.parametrize("peer", ["gluon", "timm"])
def test_another_implementation_that_has_these_keys_is_named(peer):
    _, file, *_ = read("tea1528")
    with pytest.raises(ValueError, match=r"unknown .*'W_z\.0\..*; these are the keys of 'tea1528'\.$"):
        from_peer(file, peer=peer, prefix=PLACE)


@pytest.mark.parametrize("prefix", ["", "stage", "stage.1", "stage.1.bloc", "stage.1.block.g"])
def test_a_prefix_that_names_no_block_lists_those_that_there_are(prefix):
    _, file, *_ = read("slowfast")
    message = f"`prefix` must name a block of 'slowfast'. Got {prefix!r}; blocks found: '{PLACE}' (slowfast)."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        from_peer(file, peer="slowfast", prefix=prefix)


def test_a_file_without_blocks_is_said_to_have_none():
    with pytest.raises(ValueError, match=r"^`prefix` must name a block of 'mmcv'\. Got ''; blocks found: none\.$"):
        from_peer({}, peer="mmcv")


# Arguments


@pytest.mark.parametrize("call", [find_peer_blocks, lambda file: from_peer(file, peer="mmcv")])
@pytest.mark.parametrize(
    ("file", "message"),
    [
        (None, "be a mapping from names to arrays. Got None of type NoneType."),
        (["g.weight"], "be a mapping from names to arrays. Got ['g.weight'] of type list."),
        ({"g.weight": np.ones(2), 1: np.ones(2)}, "have strings for keys. Got 1 of type int."),
    ],
)
def test_a_state_dict_is_a_mapping_from_names(call, file, message):
    with pytest.raises(TypeError, match=f"^{re.escape('`state_dict` must ' + message)}$"):
        call(file)


@pytest.mark.parametrize("call", [find_peer_blocks, lambda file: from_peer(file, peer="mmcv")])
def test_a_file_that_holds_the_state_dict_is_refused_with_its_place(call):
    message = "`state_dict` must be a mapping from names to arrays. Got mappings within it, under ['model_state']."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call({"epoch": 3, "model_state": {"g.weight": np.ones((2, 2))}})


@pytest.mark.parametrize("call", [from_peer, lambda params, peer: to_peer(params, NonLocalSpec(channels=2), peer=peer)])
def test_an_unknown_implementation_is_refused(call):
    with pytest.raises(ValueError, match=r"^`peer` must be one of .*'slowfast', .*\. Got 'mmaction2'\.$"):
        call({}, peer="mmaction2")


@pytest.mark.parametrize("prefix", [None, 3])
def test_a_prefix_is_a_string(prefix):
    with pytest.raises(TypeError, match=r"^`prefix` must be a string\. Got "):
        from_peer({}, peer="mmcv", prefix=prefix)


# Writing


TORCH_ROWS = [row for row, (peer, *_) in ROWS.items() if not peer.startswith(("official", "keras"))]


@pytest.mark.parametrize("prefix", [PLACE, f"{PLACE}."])
@pytest.mark.parametrize("row", TORCH_ROWS)
def test_what_was_read_is_written_back(row, prefix):
    peer, rank, *_ = ROWS[row]
    _, file, found, spec = read(row)
    written = to_peer(found, spec, peer=peer, prefix=prefix, rank=rank)
    assert written.keys() == {key for key in file if not key.endswith("num_batches_tracked")}
    for key, array in written.items():
        np.testing.assert_array_equal(array, file[key], strict=True)


@pytest.mark.parametrize("row", TORCH_ROWS)
def test_what_is_written_shares_no_memory(row):
    peer, rank, *_ = ROWS[row]
    _, _, found, spec = read(row)
    arrays = [*to_peer(found, spec, peer=peer, rank=rank).values(), *found.values()]
    assert not any(np.shares_memory(a, b) for i, a in enumerate(arrays) for b in arrays[:i])


def new(**options):
    spec = NonLocalSpec(channels=8, **options)
    return init_params(spec, np.random.default_rng(0)), spec


@pytest.mark.parametrize(
    ("peer", "options", "shape"),
    [
        ("mmcv", {}, (4, 8, 1, 1, 1)),
        ("mmcv", {"subsample": (2,)}, (4, 8, 1)),
        ("timm", {"norm": "batch", "scale": "input"}, (4, 8, 1, 1)),
    ],
)
def test_the_rank_is_that_of_the_spec_or_the_largest(peer, options, shape):
    params, spec = new(**options)
    file = to_peer(params, spec, peer=peer)
    assert next(array.shape for key, array in file.items() if key.startswith("g.") and "weight" in key) == shape


@pytest.mark.parametrize(
    ("peer", "options"),
    [
        ("mmcv", {"scale": 4**-0.5, "subsample": 1}),
        ("mmcv", {"subsample": (1, 1, 1), "subsample_at": "input"}),
        ("alexhex7", {"scale": 1.0, "norm_epsilon": 0.1, "zero_init": False, "norm_momentum": 0.5}),
        ("slowfast", {"norm": "batch", "pairwise": D, "group_size": 2, "norm_epsilon": 0.1}),
        ("pytorchvideo", {"scale": "inner", "norm": "affine", "subsample": (2, 3, 3), "subsample_at": "input"}),
        ("timm", {"norm": "batch"}),
        ("mmdet2019", {"scale": 2.0}),
        ("mmdet2019", {}),
    ],
)
def test_options_that_the_implementation_has_or_that_mean_nothing_are_written(peer, options):
    params, spec = new(**options)
    file = to_peer(params, spec, peer=peer)
    assert len(file) == len(params)


@pytest.mark.parametrize(
    ("peer", "options", "message"),
    [
        ("alexhex7", {"scale": "inner"}, "`scale` must be None for a block that 'alexhex7' can compute. Got 'inner'."),
        ("mmcv", {"scale": 2.0}, "`scale` must be 'inner' for a block that 'mmcv' can compute. Got 2.0."),
        ("slowfast", {"norm": "batch"}, "`scale` must be 'inner' for a block that 'slowfast' can compute. Got None."),
        ("mmcv", {"subsample": (2, 2, 2)}, "`subsample` must be (1, 2, 2) for a block that 'mmcv' can"),
        ("tea1528", {"subsample": (1, 2, 2)}, "`subsample` must be None for a block that 'tea1528' can"),
        ("mmcv", {"subsample": (2, 2), "subsample_at": "input"}, "`subsample_at` must be 'projection' for a block"),
        (
            "slowfast",
            {"norm": "batch", "scale": "inner", "subsample": (1, 2, 2)},
            "`subsample_at` must be 'input' for a block that 'slowfast' can compute. Got 'projection'.",
        ),
        ("mmcv", {"axes": "space"}, "`axes` must be 'all' for a block that 'mmcv' can compute. Got 'space'."),
        ("pytorchvideo", {"scale": "inner", "group_size": 4}, "`group_size` must be None for a block that"),
        ("tea1528", {"norm": "batch", "norm_epsilon": 0.1}, "`norm_epsilon` must be 1e-05 for a block that"),
        ("mmcv", {"residual": False}, "`residual` must be True for a block that 'mmcv' can compute. Got False."),
        ("mmcv", {"norm": "batch"}, "`bias` must be {'theta': True, 'phi': True, 'g': True, 'out': False} for a block"),
        ("tea1528", {"pairwise": C}, "`bias` must be {'theta': True, 'phi': True, 'g': True, 'concat': True, 'out'"),
        ("timm", {"pairwise": D, "norm": "batch"}, "`pairwise` must be 'embedded_gaussian' for the preset 'timm'."),
        ("timm", {}, "`norm` must be 'batch' for the preset 'timm'. Got None."),
        ("mmcv", {"norm": "affine"}, "`norm` must be one of None, 'batch' for the preset 'mmcv'. Got 'affine'."),
        ("timm", {"norm": "batch", "subsample": (1, 2, 2)}, "`rank` must be 2 for the preset 'timm'. Got 3."),
    ],
)
def test_what_the_implementation_cannot_compute_is_refused(peer, options, message):
    params, spec = new(**options)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        to_peer(params, spec, peer=peer)


def test_a_function_cannot_be_written():
    params, spec = new(pairwise=max, normalize="count")
    with pytest.raises(ValueError, match=r"^`pairwise` must be one of .* for the preset 'mmcv'\. Got <built-in"):
        to_peer(params, spec, peer="mmcv")


def test_the_rank_must_be_that_of_the_spec():
    params, spec = new(subsample=(2, 2))
    with pytest.raises(ValueError, match=r"^`rank` must be 2, as the options require\. Got 3\.$"):
        to_peer(params, spec, peer="mmcv", rank=3)


@pytest.mark.parametrize("peer", ["official", "official_affine", "keras_nonlocal"])
def test_files_of_other_frameworks_are_not_written(peer):
    params, spec = new()
    with pytest.raises(ValueError, match=rf"^`peer` must be one of 'slowfast', .*\. Got '{peer}'\.$"):
        to_peer(params, spec, peer=peer)


def test_the_parameters_must_be_those_of_the_spec():
    params, spec = new()
    with pytest.raises(ValueError, match=r"^`params` must hold exactly "):
        to_peer({**params, "norm.weight": np.ones(8)}, spec, peer="mmcv")


def test_the_spec_must_be_a_spec():
    with pytest.raises(TypeError, match=r"^`spec` must be a NonLocalSpec\. Got None"):
        to_peer({}, None, peer="mmcv")
