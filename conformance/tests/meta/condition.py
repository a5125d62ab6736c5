"""How far rounding alone moves what a case compares: a right implementation may be as far off."""

import dataclasses

import numpy as np
from textbook import Textbook

import nonlocal_core as nlc
from nonlocal_conformance.assertions import largest
from nonlocal_conformance.checks.derivatives import largest_of_layer, reference_gradients, second_derivatives
from nonlocal_conformance.checks.training import trajectory
from nonlocal_conformance.checks.values import with_hidden
from nonlocal_conformance.drivers.torch import TorchDriver
from nonlocal_conformance.registry import methods_of
from nonlocal_core.geometry import cut, windows_of

LARGEST = 32
"""The condition of a case: half of the 64 epsilons that are allowed, so that other kernels than these pass too."""


def condition(case):
    """Return the largest error of two right implementations in float32, in epsilons of what it is relative to."""
    data, found = case.data("float32"), []
    every = [data]
    if case.mask is not None:
        every.append(dataclasses.replace(data, x=with_hidden(data.x, data), dz=with_hidden(data.dz, data)))
    torch, training = TorchDriver(), case.training
    for given in every:
        expected, terms = reference_gradients(case, given.wide())
        arguments = (case.spec, given.params, given.x, given.dz, given.key_mask)
        results = [torch.vjp(*arguments, training=training, method=method) for method in methods_of(torch, case.spec)]
        results.append(Textbook().vjp(*arguments, training=training))
        found += [_condition(actual, expected, terms) for actual in results]
    return max(found)


def is_alive(case):
    """Return whether the ReLU of a concatenation lets some pairs pass and others not."""
    data, spec = case.data(), case.spec
    if spec.pairwise != "concatenation" or case.mask == "all" or spec.sets(case.spatial).keys == 1:
        return True
    every = spec.replace(pairwise="dot_product", bias={name: spec.bias[name] for name in spec.bias if name != "concat"})
    params = {name: a for name, a in data.params.items() if not name.startswith("concat.")}
    pairs = np.count_nonzero(nlc.attention(data.x, params, every, key_mask=data.key_mask))
    return 0 < np.count_nonzero(nlc.attention(data.x, data.params, spec, key_mask=data.key_mask)) < pairs


def is_varied(case):
    """Return whether no parameters are equal, a mask hides some of a sample, and ties are in windows as they should."""
    data, sets = case.data(), case.spec.sets(case.spatial)
    if len({a.tobytes() for a in data.params.values()}) < len(data.params):
        return False
    shown = [] if case.mask != "some" else data.key_mask[: max(case.batch - 1, 1)]
    if not all(sample.any() and not sample.all() for sample in shown):
        return False
    windows = windows_of(np, cut(np, data.x, sets), sets)
    if not (case.ties and case.is_pooled) or windows.shape[2] == 1:
        return True
    return (windows[:, :, 1:] == windows[:, :, :-1]).all(axis=-1).any()


def is_smooth(case):
    """Return whether second derivatives are those of finite differences: no step crosses a tie or a kink."""
    if case.ties:  # which no check asks for
        return True
    try:
        for dtype in ("float64", "float32"):
            second_derivatives(TorchDriver(), case, dtype)
    except AssertionError:
        return False
    return True


def is_stable(case):
    """Return whether training in float32 stays beside that in float64."""
    try:
        trajectory(TorchDriver(), case, "float32")
    except AssertionError:
        return False
    return True


def _condition(actual, expected, terms):
    found = [_error(actual[0], expected[0], largest(expected[0], terms[0]))]
    for name, gradient in expected[1].items():
        found.append(_error(actual[1][name], gradient, largest_of_layer(name, expected[1], terms[1])))
    return max(found)


def _error(actual, expected, scale):
    error = largest(actual - expected)
    return float(error / scale / np.finfo(np.float32).eps if scale else error)
