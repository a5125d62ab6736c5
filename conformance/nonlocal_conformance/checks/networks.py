"""Blocks in a network: put in, looked at, taken out, and the network as it was in all else."""

from __future__ import annotations

import math
import operator
import zlib
from typing import Any

import numpy as np

import nonlocal_core as nlc
from nonlocal_conformance.assertions import assert_close, assert_names, assert_same, require
from nonlocal_conformance.cases import Array, Case
from nonlocal_conformance.checks.errors import Call, outcome
from nonlocal_conformance.driver import Network, Params
from nonlocal_conformance.registry import check
from nonlocal_core.networks.insertion import CHILD, Insertion, fail_taken, resolve_block, resolve_places
from nonlocal_core.planning import check_method
from nonlocal_core.spec.parameters import STATISTICS, check_params

LAYERS = ("entry", "middle", "head")
"""The layers of the network. Blocks are put after the first two; the third has other channels."""


def _is_inserted(case: Case) -> bool:
    spec = case.spec
    is_identity = spec.residual and spec.zero_init
    return is_identity and case.is_differentiable and case.mask is None and not case.training and not case.ties


def _topic(case: Case) -> str:
    """Return what is special about a case."""
    spec = case.spec
    if spec.norm is not None:
        return spec.norm
    if not case.is_one_set:
        return "sets"
    return "pooling" if case.is_pooled else str(spec.pairwise)


def _is_one(case: Case) -> bool:
    return _is_inserted(case) and case.spec.norm == "batch"


def _matrices(case: Case, dtype: str) -> Params:
    rng = np.random.default_rng(zlib.crc32(b"network " + case.name.encode()))
    sizes = {name: (3 if name == "head" else case.spec.channels, case.spec.channels) for name in LAYERS}
    return {name: (rng.normal(size=size) / math.sqrt(size[1])).astype(dtype) for name, size in sizes.items()}


def _options(case: Case) -> dict[str, Any]:
    return {"inner_channels": case.spec.inner_channels, **case.options}


def _network(driver: Any, case: Case, dtype: str) -> tuple[Network, Params, Array]:
    """Return a network, its matrices and an input."""
    layers, x = _matrices(case, dtype), case.data(dtype).x
    return driver.network(layers, x.shape), layers, x


def _with_blocks(driver: Any, case: Case, dtype: str) -> tuple[Network, Params, Array, list[Insertion]]:
    """Return a network whose two blocks have parameters of their own, its matrices, an input and what was put in."""
    network, layers, x = _network(driver, case, dtype)
    insertions = network.insert(list(LAYERS[:2]), x, **_options(case))
    _load(network, insertions, case, dtype)
    return network, layers, x, insertions


def _load(network: Network, insertions: list[Insertion], case: Case, dtype: str) -> None:
    for one, params in zip(insertions, _block_params(case, dtype), strict=True):
        network.load(one.name, params)


def _block_params(case: Case, dtype: str) -> tuple[Params, Params]:
    params = case.data(dtype).params
    return params, {name: a / 2 for name, a in params.items()}


def _flows(case: Case, layers: Params, x: Array, dtype: str) -> tuple[list[Array], Array]:
    """Return what enters each of two blocks and what leaves the network, by the reference."""
    entering, flow = [], x.astype(np.float64)
    for name, params in zip(LAYERS, _block_params(case, dtype), strict=False):
        entering.append(flow @ layers[name].astype(np.float64).T)
        wide = {key: a.astype(np.float64) for key, a in params.items()}
        flow = nlc.nonlocal_block(entering[-1], wide, case.spec)
    return entering, flow @ layers["head"].astype(np.float64).T


def _assert_state(name: str, network: Network, expected: Params) -> None:
    state = network.state()
    assert_names(f"the state {name}", state, expected)
    for key, array in expected.items():
        assert_same(f"{key} {name}", state[key], array)


@check("network", cases=_is_inserted, first=_topic)
def insertion(driver: Any, case: Case, dtype: str) -> None:
    """Blocks that are put into a network change nothing that it computes or holds, and are told as they are."""
    network, _, x = _network(driver, case, dtype)
    state, outputs = network.state(), [network.run(x, training=training) for training in (False, True)]
    after = [LAYERS[1], LAYERS[0]]
    insertions = network.insert(after, x, **_options(case))
    require([one.after for one in insertions] == after, f"insertions must come in the order {after}: {insertions}")
    for one in insertions:
        require(one.spec == case.spec, f"{one.name} must have the spec {case.spec}, and has {one.spec}")
        fits = len(one.shape) == x.ndim and all(a in {None, b} for a, b in zip(one.shape, x.shape, strict=True))
        require(fits, f"the shape at {one.after} must be {x.shape}, and is {one.shape}")
    larger = network.state()
    require(larger.keys() > state.keys(), "the network must have the state that it had, and that of its blocks")
    for name, array in state.items():
        assert_same(f"{name} after the insertion", larger[name], array)
    added = {name: a for name, a in larger.items() if name not in state and a.dtype.kind != "i"}  # PyTorch counts steps
    dtypes = {a.dtype.name for a in added.values()}
    require(dtypes == {dtype}, f"the state of the blocks must have dtype {dtype}, and has {sorted(dtypes)}")
    shapes = nlc.param_shapes(case.spec)
    statistics = sum(math.prod(shapes[name]) for name in STATISTICS if name in shapes)
    counted = sum(one.parameters + statistics for one in insertions)
    size = sum(a.size for a in added.values())
    require(size == counted, f"the blocks must add {counted} numbers, as they say, and add {size}")
    network.check_identity()
    for training, output in zip((False, True), outputs, strict=True):
        assert_same("the output after the insertion", network.run(x, training=training), output)


@check("network", cases=_is_inserted, first=_topic)
def inserted_blocks(driver: Any, case: Case, dtype: str) -> None:
    """What follows a block sees what it gives, which is the reference's; one more block leaves it alone."""
    network, layers, x, _ = _with_blocks(driver, case, dtype)
    assert_close("the output", network.run(x), _flows(case, layers, x, dtype)[1], dtype=dtype)
    state, output = network.state(), network.run(x)
    network.insert(["head"], x)
    after = network.state()
    for name, array in state.items():
        assert_same(f"{name} after another insertion", after[name], array)
    assert_same("the output after another insertion", network.run(x), output)


@check("network", cases=_is_inserted, first=_topic)
def attention_in_a_network(driver: Any, case: Case, dtype: str) -> None:
    """The weights of a block in a network are the reference's for what enters it; the network stays as it is."""
    network, layers, x, insertions = _with_blocks(driver, case, dtype)
    entering, _ = _flows(case, layers, x, dtype)
    network.run(x, training=True)  # so that the network is in training, and only a look at it is not
    _load(network, insertions, case, dtype)
    state = network.state()
    chosen = [math.prod(case.spatial) - 1, 0]
    for one, flow, params in zip(insertions, entering, _block_params(case, dtype), strict=True):
        wide = {name: a.astype(np.float64) for name, a in params.items()}
        for block, positions in ((one.name, None), (one.after, chosen)):
            found = network.attention_of(x, block, positions)
            expected = nlc.attention(flow, wide, case.spec, positions)
            assert_close(f"attention of {block}", found.weights, expected, dtype=dtype)
            require(found.sizes == case.spatial, f"the grid must be {case.spatial}, and is {found.sizes}")
            queries = list(range(math.prod(case.spatial))) if positions is None else chosen
            require(found.positions.tolist() == queries, f"the positions must be {queries}, and are {found.positions}")
            require(found.spec == case.spec, f"the spec must be {case.spec}, and is {found.spec}")
    _assert_state("after a look at the attention", network, state)


@check("network", cases=_is_one, first=_is_one, every_dtype=False)
def identity_in_a_network(driver: Any, case: Case, dtype: str) -> None:
    """A block that adds something to its input, by a weight or by a bias alone, is named, and no other is."""
    network, _, x = _network(driver, case, dtype)
    insertions, named = network.insert(list(LAYERS[:2]), x, **_options(case)), []
    for one, zero in zip(insertions, ("norm.weight", "norm.bias"), strict=True):
        params = case.data(dtype).params
        network.load(one.name, {**params, zero: np.zeros_like(params[zero])})
        named.append(one.name)
        got = outcome(lambda _: network.check_identity(), None)
        said = got.startswith("ValueError: `model` must have blocks that are the identity")
        found = [other.name for other in insertions if repr(other.name) in got]
        require(said and found == named, f"{named} are not the identity, and the check says: {got}")


@check("network", cases=_is_inserted, first=_topic)
def removal(driver: Any, case: Case, dtype: str) -> None:
    """Blocks that are taken out leave the network as it was before them, and their places free."""
    network, _, x = _network(driver, case, dtype)
    state, output = network.state(), network.run(x)
    for _ in range(2):
        _load(network, network.insert(list(LAYERS[:2]), x, **_options(case)), case, dtype)
        network.remove()
        _assert_state("after the removal", network, state)
        assert_same("the output after the removal", network.run(x), output)


def _wrong_calls(case: Case, x: Array, block: str) -> dict[str, tuple[Call, Call]]:
    """Return wrong calls of a network with this block after "entry", each with a call of the core that fails alike."""
    sizes, queries = (None, *case.spatial, case.spec.channels), math.prod(case.spatial)

    def at(after: Any) -> tuple[Call, Call]:
        return lambda network: network.insert(after, x), lambda _: resolve_places(after, LAYERS)

    def taken(_: Any) -> None:
        raise fail_taken(LAYERS[0])

    def option(**options: Any) -> tuple[Call, Call]:
        def reference(_: Any) -> None:
            nlc.NonLocalSpec(channels=case.spec.channels, **options).check_input(sizes)

        return lambda network: network.insert(["middle"], x, **options), reference

    def look(reference: Call, **options: Any) -> tuple[Call, Call]:
        return lambda network: network.attention_of(x, **options), reference

    def load(name: str, array: Array) -> tuple[Call, Call]:
        wrong = {**{key: np.zeros_like(a) for key, a in data.params.items()}, name: array}
        return lambda network: network.load(block, wrong), lambda _: check_params(wrong, case.spec)

    data = case.data()
    return {
        "a name alone": at("middle"),
        "no place": at([]),
        "a place that is not there": at(["middle", "midle"]),
        "an empty name": at([""]),
        "a place twice": at(["middle", "middle"]),
        "a number": at([1]),
        "a taken place": (lambda network: network.insert(["middle", LAYERS[0]], x), taken),
        "form": option(pairwise="cosine"),
        "window": option(subsample=1000),
        "axes": option(axes="space"),
        "norm": option(norm="layer"),
        "unknown option": option(subsamle=2),
        "method": (
            lambda network: network.insert(["middle"], x, method="fast"),
            lambda _: check_method("fast", "embedded_gaussian"),
        ),
        "a parameter of another shape": load("out.bias", np.zeros(1)),
        "a parameter of no number": load("norm.variance", np.full(case.spec.channels, "a")),
        "a block that is not there": look(lambda _: resolve_block("middle", [CHILD]), block="middle"),
        "a position that is not there": look(
            lambda _: nlc.attention(data.x, data.params, case.spec, [queries]), positions=[queries]
        ),
    }


@check("network", cases=_is_one, first=_is_one, every_dtype=False)
def wrong_insertions(driver: Any, case: Case, dtype: str) -> None:
    """What cannot be done raises the errors of the core, in its words, and leaves the network as it was."""
    wrong = []

    def compare(name: str, expected: str, got: str) -> None:
        # What a network calls its layers and blocks is its own.
        expected, got = (words.split("; near")[0].split("; blocks")[0] for words in (expected, got))
        wrong.extend([] if got == expected else [f"{name}:\n  expected {expected}\n  got      {got}"])

    network, _, x = _network(driver, case, dtype)
    for call, what in (("remove", "inserted non-local block"), ("check_identity", "non-local block")):
        expected = f"ValueError: `model` must have at least one {what}. Got none."
        compare(f"{call} without blocks", expected, outcome(operator.methodcaller(call), network))
    (one,) = network.insert([LAYERS[0]], x, **_options(case))
    network.load(one.name, case.data(dtype).params)
    state, output = network.state(), network.run(x)
    for name, (wrong_call, reference) in _wrong_calls(case, x, one.name).items():
        compare(name, outcome(reference, None), outcome(wrong_call, network))
        _assert_state(f"after a refusal ({name})", network, state)
    assert_same("the output after refusals", network.run(x), output)
    require(not wrong, "\n".join(["these calls must fail in the words of the core", *wrong]))
