"""Wrong arguments give the reference's errors, in its words, which name the argument."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from operator import methodcaller
from typing import Any

import numpy as np

from nonlocal_conformance.assertions import require
from nonlocal_conformance.cases import CASES, Case, relu_of_product
from nonlocal_conformance.drivers.numpy import NumpyDriver
from nonlocal_conformance.registry import check
from nonlocal_core import NonLocalSpec

Call = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Wrong:
    """A call that must fail.

    Args:
        what: what is wrong with it.
        argument: the argument that the error must name, between backticks.
        call: the call, of a driver.
    """

    what: str
    argument: str
    call: Call


def _columns(theta: Any, phi: Any) -> Any:
    """Return one score for each query."""
    return relu_of_product(theta, phi)[..., :1]


def _blocks(case: Case) -> Iterator[Wrong]:
    """Give calls of a block."""
    data, spec = case.data("float32"), case.spec
    x, params, mask = data.x, data.params, np.ones(data.x.shape[:-1], bool)
    batch = spec.replace(norm="batch")
    batch_params = {**params, **CASES["epsilon"].data("float32").params}
    inputs = {
        "no axis": np.asarray(1, np.float32),
        "one axis": x[0, 0, 0],
        "no spatial axis": x[:, 0, 0],
        "four spatial axes": x[:, :, :, None, None],
        "channels": x[..., :-1],
        "empty axis": x[:, :0],
        "integers": x.astype(np.int64),
        "truths": x > 0,
        "complex numbers": x.astype(np.complex64),
    }
    for what, wrong in inputs.items():
        yield Wrong(f"x with {what}", "x", methodcaller("block", spec, params, wrong.copy()))
    masks = {
        "of another shape": mask[:, :-1],
        "for one sample": mask[:1],
        "of flat positions": mask.reshape(len(x), -1),
        "of one row": mask[:, :1],
        "of one row for all samples": mask[:1, :1],
        "with an axis of channels": mask[..., None],
        "without an axis": np.ones((), bool),
        "of numbers": mask.astype(np.float32),
    }
    for what, wrong in masks.items():
        yield Wrong(f"mask {what}", "key_mask", methodcaller("block", spec, params, x, wrong.copy()))
    groups, frames = spec.replace(group_size=2), np.stack([x, x, x], axis=1)
    yield Wrong("window", "subsample", methodcaller("block", spec.replace(subsample=6), params, x))
    yield Wrong("rank of the window", "x", methodcaller("block", spec.replace(subsample=(2, 2, 2)), params, x))
    for dtype in (np.int64, bool):
        whole = {name: a.astype(dtype) for name, a in params.items()}
        yield Wrong(f"parameters of {dtype.__name__}", "params['theta.weight']", methodcaller("block", spec, whole, x))
    yield Wrong("rank", "x", methodcaller("block", spec.replace(axes="space"), params, x))
    yield Wrong("axis", "axes", methodcaller("block", spec.replace(axes=(0, 2)), params, x))
    yield Wrong("groups", "group_size", methodcaller("block", groups, params, frames))
    yield Wrong("one value", "x", methodcaller("block", batch, batch_params, x[:1, :1, :1].copy(), training=True))
    yield Wrong("method", "method", methodcaller("block", spec, params, x, method="fast"))


def _parameters(case: Case) -> Iterator[Wrong]:
    """Give imports of parameters."""
    spec, params = case.spec, case.data("float32").params
    weight = params["g.weight"]
    missing = {name: a for name, a in params.items() if name != "g.bias"}
    yield Wrong("missing parameter", "params", methodcaller("export", spec, missing))
    yield Wrong("unknown parameter", "params", methodcaller("export", spec, {**params, "g.scale": params["g.bias"]}))
    for what, wrong in {"shape": weight.T.copy(), "dtype": weight.astype(np.int64), "type": weight.tolist()}.items():
        changed = {**params, "g.weight": wrong}
        yield Wrong(f"{what} of a parameter", "params['g.weight']", methodcaller("export", spec, changed))
    yield Wrong("spec of parameters", "spec", methodcaller("export", "dot_product", params))


def _rows(case: Case) -> Iterator[Wrong]:
    """Give calls for rows of the weights."""
    spec, data = case.spec, case.data("float32")
    for wrong in ([0, 35], [-1], [0.5], [[0]], "x", 1j):
        yield Wrong(f"positions {wrong!r}", "positions", methodcaller("attention", spec, data.params, data.x, wrong))


def _operations(_: Case) -> Iterator[Wrong]:
    """Give calls of the operation."""
    theta, phi, g = (np.ones((2, size, 5), np.float32) for size in (11, 7, 7))
    mask, weight = np.ones((2, 7), bool), np.ones(10, np.float32)
    arrays: dict[str, Any] = {"theta": theta, "phi": phi, "g": g}
    concat = {"concat_weight": weight, "concat_bias": np.asarray(1, np.float32), "key_mask": mask}
    whole: dict[str, Any] = {**arrays, "pairwise": "concatenation", **concat}

    def wrong(what: str, argument: str, **changes: Any) -> Wrong:
        return Wrong(what, argument, methodcaller("op", **{**arrays, **changes}))

    for name, array in (arrays | concat).items():
        kinds = {"integers": np.int64, "complex numbers": np.complex64, "numbers": np.float32, "truths": bool}
        for kind, dtype in kinds.items():
            if dtype != array.dtype:
                yield wrong(f"{name} of {kind}", name, **{**whole, name: array.astype(dtype)})
        yield wrong(f"{name} with another axis", name, **{**whole, name: array[None].copy()})
    for name in ("pairwise", "scale", "normalize", "method"):
        for value in ("fast", b"x", 1j, 0, ()):
            yield wrong(f"{name} {value!r}", name, **{name: value})
    yield wrong("scale name", "scale", scale="inner")
    yield wrong("normalize", "normalize", normalize="softmax")
    yield wrong("function", "normalize", pairwise=relu_of_product)
    yield wrong("no weight", "concat_weight", pairwise="concatenation")
    yield wrong("needless weight", "concat_weight", concat_weight=weight)
    yield wrong("weight shape", "concat_weight", **{**whole, "concat_weight": weight[:5].copy()})
    yield wrong("mask is a list", "key_mask", key_mask=[[True]])
    yield wrong("no keys", "phi", phi=phi[:, :0].copy(), g=g[:, :0].copy())
    yield wrong("width of phi", "phi", phi=phi[..., :4].copy())
    yield wrong("batch of phi", "phi", phi=phi[:1].copy())
    yield wrong("keys of g", "g", g=g[:, :6].copy())
    yield wrong("mask of other keys", "key_mask", key_mask=mask[:, :6].copy())


def _functions(case: Case) -> Iterator[Wrong]:
    """Give calls with functions whose scores are not one for each pair."""
    data = case.data("float32")
    arrays = [np.ones((1, size, 5), np.float32) for size in (11, 7, 7)]
    functions = {
        "one column": _columns,
        "one row": lambda theta, phi: relu_of_product(theta, phi)[:, :1],
        "no batch": lambda theta, phi: relu_of_product(theta, phi)[0],
        "truths": lambda theta, phi: relu_of_product(theta, phi) > 0,
        "a number": lambda theta, phi: 1.0,  # noqa: ARG005 - that is what is wrong
    }
    for what, function in functions.items():
        options = {"pairwise": function, "normalize": "count"}
        yield Wrong(f"scores: {what}", "pairwise(theta, phi)", methodcaller("op", *arrays, **options))
    spec = case.spec.replace(pairwise=_columns, normalize="softmax")
    yield Wrong("scores of a block", "pairwise(theta, phi)", methodcaller("block", spec, data.params, data.x[:1]))


def _options(_: Case) -> Iterator[Wrong]:
    """Give options of a new block."""
    values: dict[str, tuple[Any, ...]] = {
        name: ("fast", b"x", 1j, -1.5, [[]], (1, 2, 3, 4)) for name in NonLocalSpec.__dataclass_fields__
    }
    for name in ("scale", "norm_momentum"):
        values[name] = ("fast", b"x", 1j, [[]])
    for name, wrong in values.items():
        for value in wrong:
            options = {"channels": 8, name: value}
            yield Wrong(f"{name}={value!r}", name, methodcaller("create", **options))
    for name in ("subsamle", "normalise", "chanels", "heads"):
        yield Wrong(f"option {name}", name, methodcaller("create", **{"channels": 8, name: 2}))
    yield Wrong("spec of a new block", "spec", methodcaller("initial", "dot_product"))


def outcome(call: Call, driver: Any) -> str:
    """Return the type and the words of the error that a call raises."""
    try:
        call(driver)
    except Exception as error:  # noqa: BLE001 - any other error is what the check reports
        # A class names itself where it does not know an option.
        return re.sub(r"(must be an option of) \S+\.", r"\1 this.", f"{type(error).__name__}: {error}")
    return "no error"


_CALLS = {
    "block": _blocks,
    "export": _parameters,
    "attention": _rows,
    "op": _operations,
    "functions": _functions,
}


def _is_one(case: Case) -> bool:
    return case.is_plain and case.spec.pairwise == "embedded_gaussian" and case.rank == 2  # noqa: PLR2004


@check("errors", cases=_is_one, first=_is_one, every_dtype=False)
def errors(driver: Any, case: Case, dtype: str) -> None:  # noqa: ARG001 - errors have no dtype
    """Wrong arguments raise the reference's TypeError or ValueError, word for word, which names the argument."""
    for group, calls in _CALLS.items():
        if group == "block" or group in driver.capabilities:
            _assert_refused(driver, calls(case))


@check("errors", "vjp", cases=_is_one, first=_is_one, every_dtype=False)
def wrong_gradients(driver: Any, case: Case, dtype: str) -> None:
    """A gradient of z in another shape is refused, in whatever words, and not broadcast."""
    data = case.data(dtype)
    for what, dz in {"one sample": data.dz[:1], "one channel": data.dz[..., :1], "one row": data.dz[:, :1]}.items():
        found = outcome(methodcaller("vjp", case.spec, data.params, data.x, dz.copy()), driver)
        require(found != "no error", f"a gradient of z for {what} must be refused")


@check("errors", "create", cases=_is_one, first=_is_one, every_dtype=False)
def wrong_options(driver: Any, case: Case, dtype: str) -> None:  # noqa: ARG001 - errors have no dtype
    """Wrong and unknown options of a new block raise the reference's errors, word for word."""
    _assert_refused(driver, _options(case))


def _assert_refused(driver: Any, calls: Iterator[Wrong]) -> None:
    found = []
    for wrong in calls:
        expected, actual = outcome(wrong.call, NumpyDriver()), outcome(wrong.call, driver)
        known = re.match(rf"(Type|Value)Error: `{re.escape(wrong.argument)}` must .* Got ", expected)
        require(known is not None, f"{wrong.what}: the reference gave {expected}")
        if actual != expected:
            found.append(f"{wrong.what}:\n  expected {expected}\n  got      {actual}")
    require(not found, "\n".join(["these calls must fail as the reference does", *found]))
