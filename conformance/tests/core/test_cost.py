"""The cost of a block: against the paper, against counts by hand, and how it grows."""

import math
import subprocess
import sys

import pytest

import nonlocal_core as nlc

FORMS = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
EXACT = dict(zip(FORMS, ("streamed", "streamed", "reassociated", "sorted"), strict=True))
BATCH, POSITIONS, KEYS, OUTER, INNER = 2, 35, 6, 8, 5  # a grid of 7 x 5, windows of 2 x 2 and a remainder


def spec_of(pairwise="embedded_gaussian", **options):
    return nlc.NonLocalSpec(**{"channels": OUTER, "inner_channels": INNER, "pairwise": pairwise, **options})


def count(spec, shape=(BATCH, 7, 5, OUTER), method="pairwise", **options):
    return nlc.cost(spec, shape, **options).methods[method]


def own_form(theta, phi):
    raise NotImplementedError


# The paper: five blocks in a ResNet-50, two in res3 and three in res4


def five_blocks(**options):
    """Return the parameters and the multiply-adds of the five blocks for 4 frames of 224 x 224."""
    stages = [(2, (1, 4, 28, 28, 512)), (3, (1, 4, 14, 14, 1024))]
    costs = [(blocks, nlc.cost(nlc.NonLocalSpec(channels=shape[-1], **options), shape)) for blocks, shape in stages]
    parameters = sum(blocks * found.parameters for blocks, found in costs)
    return parameters, sum(blocks * found.methods["pairwise"].macs for blocks, found in costs)


@pytest.mark.parametrize(
    ("options", "billions"),
    [
        ({"subsample": (1, 2, 2), "subsample_at": "input"}, 8.1),
        ({"subsample": (1, 2, 2), "subsample_at": "projection"}, 11.2),
        ({}, 20.2),
    ],
)
def test_five_blocks_take_the_multiply_adds_that_the_paper_implies(options, billions):
    assert round(five_blocks(**options)[1] / 1e9, 1) == billions


@pytest.mark.parametrize(("channels", "millions"), [(512, 0.527), (1024, 2.102)])
def test_a_block_with_batch_norm_has_the_parameters_of_the_paper(channels, millions):
    found = nlc.cost(nlc.NonLocalSpec(channels=channels, norm="batch"), (1, 4, channels))
    assert round(found.parameters / 1e6, 3) == millions


def test_five_blocks_add_the_parameters_of_the_paper_with_the_scale_and_shift_of_the_norm():
    assert round(five_blocks(norm="batch")[0] / 1e6, 2) == 7.36


def test_five_blocks_without_a_norm_have_fewer_parameters():
    assert round(five_blocks()[0] / 1e6, 2) == 7.35


# Parameters


@pytest.mark.parametrize("norm", [None, "affine", "batch"])
@pytest.mark.parametrize("pairwise", FORMS)
def test_the_parameters_are_those_that_are_trained(pairwise, norm):
    spec = spec_of(pairwise, norm=norm, bias={"out": False})
    shapes = nlc.param_shapes(spec)
    trained = [math.prod(shape) for name, shape in shapes.items() if name not in {"norm.mean", "norm.variance"}]
    assert nlc.cost(spec, (1, 4, OUTER)).parameters == sum(trained)


# FLOPs, by hand


@pytest.mark.parametrize(
    ("options", "projections"),
    [
        ({}, 4 * POSITIONS),
        ({"subsample": 2}, 4 * POSITIONS),
        ({"subsample": 2, "subsample_at": "input"}, 2 * POSITIONS + 2 * KEYS),
    ],
)
def test_pooling_at_the_input_makes_the_projections_of_the_keys_cheaper(options, projections):
    keys = KEYS if options else POSITIONS
    macs = BATCH * (projections * OUTER * INNER + 2 * POSITIONS * keys * INNER)
    assert count(spec_of(**options)).macs == macs


PROJECTIONS = 4 * BATCH * POSITIONS * OUTER * INNER
PAIRS = BATCH * POSITIONS * KEYS


@pytest.mark.parametrize(
    ("pairwise", "method", "operation"),
    [
        ("gaussian", "pairwise", PAIRS * (OUTER + INNER) - PROJECTIONS // 2),
        ("gaussian", "streamed", PAIRS * (OUTER + INNER) - PROJECTIONS // 2),
        ("embedded_gaussian", "streamed", PAIRS * 2 * INNER),
        ("dot_product", "reassociated", BATCH * (POSITIONS + KEYS) * INNER**2),
        ("concatenation", "pairwise", BATCH * (POSITIONS + KEYS) * INNER + PAIRS * INNER),
        ("concatenation", "sorted", BATCH * (2 * POSITIONS + 3 * KEYS) * INNER),
    ],
)
def test_a_method_takes_the_multiply_adds_of_its_products(pairwise, method, operation):
    assert count(spec_of(pairwise, subsample=2), method=method).macs == PROJECTIONS + operation


def test_the_scores_of_a_function_are_not_counted():
    spec = spec_of(own_form, normalize="softmax", subsample=2)
    assert count(spec).macs == PROJECTIONS + PAIRS * INNER


def test_few_positions_keep_the_order_of_the_matrix_without_a_second_one():
    spec = spec_of("dot_product", inner_channels=50, subsample=2)
    plain, other = (count(spec, method=method) for method in ("pairwise", "reassociated"))
    assert other.macs == plain.macs
    assert plain.bytes_moved - other.bytes_moved == 4 * 2 * PAIRS


@pytest.mark.parametrize(
    ("pairwise", "method"), [(form, "pairwise") for form in FORMS] + [("dot_product", "reassociated")]
)
def test_a_training_step_has_three_products_for_each_one_forward(pairwise, method):
    spec = spec_of(pairwise, subsample=2, norm="batch")
    assert count(spec, method=method, training=True).flops == 3 * count(spec, method=method).flops


@pytest.mark.parametrize(("pairwise", "width"), [("gaussian", OUTER), ("embedded_gaussian", INNER)])
def test_a_streamed_training_step_computes_the_scores_twice(pairwise, width):
    spec = spec_of(pairwise, subsample=2)
    plain, streamed = (count(spec, method=method, training=True) for method in ("pairwise", "streamed"))
    assert streamed.macs - plain.macs == PAIRS * width


# Bytes and memory, by hand: every array of a small block, float32


def test_the_bytes_of_a_block_are_those_of_every_operand_and_result():
    x, embedded, matrix = BATCH * POSITIONS * OUTER, BATCH * POSITIONS * INNER, BATCH * POSITIONS**2
    weight = OUTER * INNER
    steps = [
        (x, 3 * weight, 3 * embedded),  # theta, phi, g
        (2 * embedded, matrix),  # the scores
        (matrix, matrix),  # the softmax
        (matrix, embedded, embedded),  # y
        (embedded, weight, x),  # W_z
        (x, x, x),  # the sum
    ]
    assert count(spec_of(bias=False)).bytes_moved == 4 * sum(map(sum, steps))


def test_the_bytes_of_a_training_step_are_those_of_the_gradients_too():
    x, embedded, matrix = BATCH * POSITIONS * OUTER, BATCH * POSITIONS * INNER, BATCH * POSITIONS**2
    weight = OUTER * INNER
    steps = [
        (x, weight, embedded),  # of y
        (x, embedded, weight),  # of W_z
        (embedded, embedded, matrix),  # of the weights
        (embedded, matrix, embedded),  # of g
        (3 * matrix,),  # of the scores
        (matrix, embedded, embedded),  # of theta
        (matrix, embedded, embedded),  # of phi
        (3 * embedded, 3 * weight, x),  # of x
        (3 * embedded, x, 3 * weight),  # of the three projections
    ]
    spec = spec_of(bias=False)
    forward, step = count(spec).bytes_moved, count(spec, training=True).bytes_moved
    assert step - forward == 4 * sum(map(sum, steps))


@pytest.mark.parametrize(
    ("training", "matrices", "embedded"),
    [(False, 2, 1), (True, 3, 3)],
    ids=["forward", "training"],
)
def test_the_most_is_held_around_the_softmax(training, matrices, embedded):
    # Forward g is waiting; backward theta, phi and the gradient of g are.
    held = matrices * POSITIONS**2 + embedded * POSITIONS * INNER
    assert count(spec_of(), training=training).peak_memory == 4 * BATCH * held


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scores_and_weights_are_held_in_float32_at_least(dtype):
    held = 2 * 4 * POSITIONS**2 + 2 * POSITIONS * INNER
    assert count(spec_of(), dtype=dtype).peak_memory == BATCH * held


def test_everything_but_indices_is_twice_as_large_in_float64():
    spec = spec_of(norm="batch")
    single, double = (count(spec, dtype=dtype, training=True) for dtype in ("float32", "float64"))
    assert (double.bytes_moved, double.peak_memory) == (2 * single.bytes_moved, 2 * single.peak_memory)
    assert double.flops == single.flops


def test_a_block_without_a_residual_writes_its_result_at_once():
    with_sum, without = (count(spec_of(residual=residual)) for residual in (True, False))
    assert with_sum.bytes_moved - without.bytes_moved == 4 * 3 * BATCH * POSITIONS * OUTER


# Growth


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("pairwise", FORMS)
def test_the_matrix_grows_with_the_square_and_the_other_method_does_not(pairwise, training):
    spec, exact = spec_of(pairwise, norm="batch"), EXACT[pairwise]
    found = [nlc.cost(spec, (1, size, OUTER), training=training).methods for size in (1000, 2000, 3000)]
    first, second, third = (methods[exact].peak_memory for methods in found)
    assert third - second == second - first
    assert third / first <= 3
    assert found[2]["pairwise"].peak_memory / found[0]["pairwise"].peak_memory > 8.5


# Sets


@pytest.mark.parametrize("pairwise", FORMS)
@pytest.mark.parametrize(
    ("options", "shape", "plain"),
    [
        ({"axes": "space", "subsample": (1, 2, 2)}, (2, 6, 5, 4, OUTER), (12, 5, 4, OUTER)),
        ({"axes": "time", "subsample": 2}, (2, 6, 5, 4, OUTER), (40, 6, OUTER)),
        ({"group_size": 3, "subsample": 2}, (2, 6, 5, 4, OUTER), (4, 3, 5, 4, OUTER)),
    ],
)
def test_sets_cost_what_as_many_samples_cost(options, shape, plain, pairwise):
    found = nlc.cost(spec_of(pairwise, **options), shape, training=True)
    assert found == nlc.cost(spec_of(pairwise, subsample=2), plain, training=True)


# Several devices

N, M = 64, 32  # positions, and keys after pooling by 2


@pytest.mark.parametrize(
    ("options", "method", "numbers"),
    [
        ({"pairwise": "dot_product"}, "reassociated", 2 * INNER * INNER),
        ({"pairwise": "dot_product"}, "pairwise", N * 2 * INNER),
        ({"pairwise": "dot_product", "subsample": 16}, "reassociated", N / 16 * 2 * INNER),
        ({"pairwise": "concatenation"}, "sorted", N * (INNER + 1)),
        ({}, "streamed", N * 2 * INNER),
        ({"subsample": 2}, "streamed", M * 2 * INNER),
        ({"pairwise": "gaussian"}, "streamed", N * (OUTER + INNER)),
        ({"pairwise": "gaussian", "subsample": 2, "subsample_at": "input"}, "streamed", M * (OUTER + INNER)),
        ({"norm": "batch"}, "streamed", N * 2 * INNER),
    ],
)
def test_a_device_receives_the_keys_of_the_others_or_sums_of_products(options, method, numbers):
    found = [count(spec_of(**options), (1, N, OUTER), method, devices=devices) for devices in (1, 2, 4)]
    assert [cost.bytes_received for cost in found] == [0, 4 * numbers / 2, 4 * numbers * 3 / 4]
    spread = count(spec_of(**{**options, "norm": None}), (1, N, OUTER), method, devices=4, training=True)
    assert spread.bytes_received == 2 * found[2].bytes_received


@pytest.mark.parametrize("options", [{"axes": "space"}, {"group_size": 2, "subsample": (1, 2, 2)}])
def test_devices_that_cut_no_set_receive_the_statistics_alone(options):
    shape = (BATCH, 8, 5, 4, OUTER)
    alone, cut = (count(spec_of(**options), shape, "streamed", devices=devices, training=True) for devices in (1, 4))
    assert (cut.bytes_received, cut.flops, cut.peak_memory) == (0, alone.flops / 4, alone.peak_memory / 4)
    cut = count(spec_of(norm="batch", **options), shape, "streamed", devices=4, training=True)
    assert cut.bytes_received == 2 * 4 * 2 * (2 * OUTER + 1) * 3 / 4


@pytest.mark.parametrize("pairwise", FORMS)
def test_a_device_computes_its_share(pairwise):
    alone, cut = (count(spec_of(pairwise), (1, N, OUTER), devices=devices, training=True) for devices in (1, 4))
    assert cut.flops == alone.flops / 4
    one, many = (count(spec_of("dot_product"), (1, N, OUTER), "reassociated", devices=d) for d in (1, 4))
    assert many.peak_memory <= one.peak_memory / 4 + 4 * INNER * INNER


def test_the_cost_of_uneven_parts_is_that_of_the_largest():
    largest = 3  # of 3, 3, 3 and 2
    assert count(spec_of(), (1, 11, OUTER), devices=4).macs == largest * (4 * OUTER * INNER + 11 * 2 * INNER)


# What there is, and what is refused


@pytest.mark.parametrize("pairwise", FORMS)
def test_there_is_one_method_beside_the_matrix(pairwise):
    assert list(nlc.cost(spec_of(pairwise), (1, 4, OUTER)).methods) == ["pairwise", EXACT[pairwise]]


def test_a_function_has_the_matrix_alone():
    assert list(nlc.cost(spec_of(own_form, normalize="count"), (1, 4, OUTER)).methods) == ["pairwise"]


def test_a_function_whose_scores_are_divided_costs_less_than_a_softmax_of_them():
    kept, divided = (
        count(spec_of(own_form, normalize=normalize), training=True).bytes_moved for normalize in ("softmax", "count")
    )
    assert kept - divided == 4 * BATCH * POSITIONS**2


def test_a_window_of_one_is_no_pooling():
    assert nlc.cost(spec_of(subsample=1), (1, 7, OUTER)) == nlc.cost(spec_of(), (1, 7, OUTER))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"dtype": "float8"}, ValueError, "`dtype` must be one of 'float16', .* Got 'float8'"),
        ({"dtype": 32}, TypeError, "`dtype` must be one of 'float16', .* Got 32 of type int"),
        ({"shape": (OUTER,)}, ValueError, r"`shape` must be \(B, S1..Sk, C\).* Got \(8,\)"),
        ({"shape": (1, 2, 2, 2, 2, OUTER)}, ValueError, r"`shape` must be \(B, S1..Sk, C\)"),
        ({"shape": (1, 0, OUTER)}, ValueError, r"`shape` must be .* positive ints. Got 0"),
        ({"shape": (1, None, OUTER)}, TypeError, r"`shape` must be .* Got None"),
        ({"shape": "1x4x8"}, TypeError, r"`shape` must be .* Got '1x4x8'"),
        ({"shape": (1, 4, 7)}, ValueError, "`x` must have 8 channels. Got 7 channels"),
        ({"shape": (1, 1, OUTER), "training": True}, ValueError, "more than one value per channel in training"),
        ({"training": 1}, TypeError, "`training` must be a bool"),
        ({"spec": "official"}, TypeError, "`spec` must be a NonLocalSpec"),
        ({"devices": 0}, ValueError, "`devices` must be a positive int. Got 0"),
        ({"devices": 2.0}, TypeError, "`devices` must be a positive int. Got 2.0"),
        ({"devices": 5}, ValueError, r"`x` must have positions for every device .* pieces of \[1, 1, 1, 1, 0\]"),
        ({"spec": spec_of(subsample=4), "devices": 2}, ValueError, "`x` must be cut between windows of `subsample`, 4"),
    ],
)
def test_what_cannot_be_counted_is_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        nlc.cost(**{"spec": spec_of(norm="batch"), "shape": (1, 4, OUTER), **arguments})


def test_no_array_is_made():
    huge = (10**6, 10**6, 10**6, 10**6, OUTER)
    assert count(spec_of(), huge).macs == 10**24 * 4 * OUTER * INNER + 10**42 * 2 * INNER


def test_no_framework_is_loaded():
    code = (
        "import sys, nonlocal_core as nlc\n"
        "nlc.cost(nlc.NonLocalSpec(channels=4), (1, 5, 4))\n"
        "print(*{'torch', 'tensorflow', 'jax'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
