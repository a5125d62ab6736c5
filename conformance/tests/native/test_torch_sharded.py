"""Blocks whose positions are cut over processes, against the reference on the whole input."""

import re

import numpy as np
import pytest
import torch_sharded as work

import nonlocal_core as nlc
from nonlocal_conformance.assertions import assert_close, largest
from nonlocal_conformance.cases import Case
from nonlocal_conformance.processes import Processes
from nonlocal_conformance.sharded.torch import processes, sharded, traffic

FORMS = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
EVEN, VOLUME, SERIES = (8, 5), (8, 4, 3), (29,)
FOUR, MESH = (4,), (2, 2)
N, C = 64, 7

CUTS = {
    "and samples": ({"subsample": 2}, EVEN, (0, 1)),
    "both axes": ({"subsample": 2}, (8, 4), (1, 2)),
    "one axis twice": ({}, SERIES, (1, 1)),
    "with copies": ({}, EVEN, (None, 2)),
}
"""Options, spatial sizes, and which axis of the input each axis of a mesh of two by two cuts."""


def case(pairwise, options, spatial, *, masked=False, batch=3):
    """Return a spec with a norm, and parameters, an input, a gradient and a mask on which an error shows."""
    every = {"pairwise": pairwise, "norm": "batch", "residual": False, "zero_init": False, **options}
    made = Case("cut", every, spatial, batch=batch, mask="some" if masked else None)
    data = made.data("float32")
    return made.spec, data.params, data.x, data.dz, data.key_mask


def _wide(a):
    if isinstance(a, dict):
        return {name: _wide(value) for name, value in a.items()}
    return a.astype("float64") if isinstance(a, np.ndarray) and a.dtype != bool else a


def assert_as_whole(found, spec, params, x, dz, mask):
    """Compare z, the gradients and the statistics with those of the reference."""
    z, after, dx, dparams = found
    wide, x, dz = _wide(params), _wide(x), _wide(dz)
    assert_close("z", z, nlc.nonlocal_block(x, wide, spec, mask, training=True), dtype="float32")
    expected_dx, expected = nlc.nonlocal_block_vjp(x, wide, spec, dz, mask, training=True)
    assert_close("dx", dx, expected_dx, dtype="float32")
    scale = largest(*expected.values())
    for name, a in dparams.items():
        assert_close(f"d{name}", a, expected[name], dtype="float32", scale=scale)
    for name, a in nlc.updated_statistics(x, wide, spec, mask, unbiased=True).items():
        assert_close(name, after[name], a, dtype="float32")


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("pairwise", FORMS)
def test_what_a_mesh_cuts_gives_what_the_whole_gives(pairwise, cut, masked):
    options, spatial, axes = CUTS[cut]
    given = case(pairwise, options, spatial, masked=masked)
    assert_as_whole(processes(4)(sharded, MESH, axes, *given, training=True)[0], *given)


@pytest.mark.parametrize("options", [{"axes": "space"}, {"group_size": 2}])
def test_a_cut_between_sets_sends_nothing_but_the_statistics(options):
    spec, params, x, _, _ = case("embedded_gaussian", options, VOLUME)
    for passes in processes(4)(traffic, FOUR, (1,), spec, params, x):
        assert passes == ((2 * (C + 1 + C) * 3 / 4, ["allreduce_"] * 2),) * 2


def test_statistics_take_two_sums_of_the_channels():
    counts = []
    for norm in ("batch", None):
        spec, params, x, _, _ = case("dot_product", {"norm": norm}, (N,), batch=1)
        counts.append([len(calls) for _, calls in processes(4)(traffic, FOUR, (1,), spec, params, x)[0]])
    assert np.subtract(*counts).tolist() == [2, 2]


def test_the_style_cuts_a_block_like_pytorchs_own():
    for found in processes(4)(work.style):
        for data_format in ("channels_first", "channels_last"):
            is_plain, *differences, same_names = found[data_format]
            assert is_plain
            assert same_names
            assert max(*differences, found[f"attention {data_format}"]) < 1e-10
        assert found["DTensor"] == (True, pytest.approx(0, abs=1e-12))


def test_optimizers_and_clipping_take_the_gradients():
    assert max(max(found) for found in processes(4)(work.training)) < 1e-8


@pytest.mark.parametrize("kind", ["another axis", "the same axis", "each layer"])
def test_fsdp_shards_the_parameters_of_a_cut_block(kind):
    assert max(max(found) for found in processes(4)(work.with_fsdp, kind)) < 1e-10


@pytest.mark.parametrize("pairwise", ["dot_product", "embedded_gaussian"])
def test_a_cut_block_compiles_as_one_graph(pairwise):
    assert max(max(found) for found in processes(4)(work.compiled, pairwise)) < 1e-10


ERRORS = {
    "window": r"`x` must be cut between windows of `subsample`, 2 here, .* pieces of \[3, 3, 3, 3\]",
    "last window": r"`x` must be cut between windows of `subsample`, 4 here, .* pieces of \[4, 4, 4, 2\]",
    "groups": r"`x` must be cut between groups of `group_size=2` frames. Got 12 .* pieces of \[3, 3, 3, 3\]",
    "no position": r"`x` must have positions for every device .* pieces of \[3, 3, 3, 0\]",
    "channels": r"`x` must be replicated, or cut along samples or positions, .* Got \(Shard\(dim=1\),\)",
    "partial": r"`x` must be replicated, or cut along samples or positions, .* Got \(Partial\(sum\),\)",
    "plain mask": r"`key_mask` must have shape",
    "whole plain mask": r"`key_mask` must be a DTensor, .* Got shape \(2, 8\) of type Tensor",
    "mask alone": r"`x` must be a DTensor, .* Got shape \(2, 6, 8\) of type Tensor",
    "mask cut otherwise": r"`key_mask` must be cut as `x` is, .* Got \(Shard\(dim=0\),\)",
    "sharded parameters": r"`theta.weight` must be replicated over the mesh",
    "another norm": r"`norm` must be the block's own",
    "synchronised with others": r"`norm` must synchronise every process of the mesh",
    "one value": "training",
    "attention": r"`x` must be whole, .* `full_tensor\(\)`",
    "axis": r"`axis` must be one of the 2 spatial axes of `x`. Got 2",
    "no block": r"`module` must be a NonLocalBlock",
}


@pytest.mark.parametrize("name", ERRORS)
def test_every_device_raises_the_same_error(name):
    found = processes(4)(work.raised, name)
    assert len({text.partition(" Got ")[0] for _, text in found}) == 1
    assert re.search(ERRORS[name], found[0][1])


@pytest.mark.parametrize(
    ("fault", "pairwise", "options", "spatial"),
    [
        ("statistics of one device", "embedded_gaussian", {}, EVEN),
        ("positions of one device counted", "embedded_gaussian", {}, SERIES),
        ("keys of one device counted", "dot_product", {}, EVEN),
        ("keys of one device", "dot_product", {}, EVEN),
        ("a gather without its mask", "embedded_gaussian", {}, EVEN),
        ("no share in the gradient of a sum", "dot_product", {}, EVEN),
        ("no share in the gradient of a parameter", "gaussian", {}, EVEN),
        ("windows across borders", "embedded_gaussian", {"subsample": 2}, (5, 4)),
        ("the biased variance", "gaussian", {}, EVEN),
    ],
)
def test_a_fault_is_found(fault, pairwise, options, spatial):
    given = case(pairwise, options, spatial, masked="mask" in fault)
    found = processes(4)(work.faulty, fault, MESH, (None, 1), *given, training=True)[0]
    with pytest.raises(AssertionError, match="differs from the reference"):
        assert_as_whole(found, *given)


@pytest.mark.parametrize(
    ("what", "error", "timeout"), [(work.hang, TimeoutError, 2.0), (work.leave, RuntimeError, 60.0)]
)
def test_a_process_that_does_not_answer_is_an_error(what, error, timeout):
    two = Processes(2, "torch_sharded")
    assert two(abs) == [0, 1]
    with pytest.raises(error, match=r"process . must answer"):
        two(what, timeout=timeout)
