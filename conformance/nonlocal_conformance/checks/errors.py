"""Wrong arguments give the reference's errors, in its words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nonlocal_conformance.assertions import require
from nonlocal_conformance.cases import CASES, Case
from nonlocal_conformance.drivers.numpy import NumpyDriver
from nonlocal_conformance.registry import check

Call = Callable[[Any], Any]


def _block_calls(case: Case) -> dict[str, Call]:
    """Return calls of a block that must fail, by what is wrong with them."""
    data, spec = case.data("float32"), case.spec
    x, params, mask = data.x, data.params, np.ones(data.x.shape[:-1], bool)
    batch = spec.replace(norm="batch")
    batch_params = {**params, **CASES["epsilon"].data("float32").params}
    return {
        "no spatial axis": lambda d: d.block(spec, params, x[:, 0, 0]),
        "four spatial axes": lambda d: d.block(spec, params, x[:, :, :, None, None]),
        "channels": lambda d: d.block(spec, params, x[..., :-1].copy()),
        "empty axis": lambda d: d.block(spec, params, x[:, :0].copy()),
        "integers": lambda d: d.block(spec, params, x.astype(np.int64)),
        "mask shape": lambda d: d.block(spec, params, x, mask[:, :-1].copy()),
        "mask batch": lambda d: d.block(spec, params, x, mask[:1].copy()),
        "mask dtype": lambda d: d.block(spec, params, x, mask.astype(np.float32)),
        "window": lambda d: d.block(spec.replace(subsample=6), params, x),
        "rank": lambda d: d.block(spec.replace(axes="space"), params, x),
        "axis": lambda d: d.block(spec.replace(axes=(0, 2)), params, x),
        "groups": lambda d: d.block(spec.replace(group_size=2), params, np.stack([x, x, x], axis=1)),
        "one value": lambda d: d.block(batch, batch_params, x[:1, :1, :1].copy(), training=True),
        "method": lambda d: d.block(spec, params, x, method="fast"),
    }


def _parameter_calls(case: Case) -> dict[str, Call]:
    """Return imports of parameters that must fail."""
    spec, params = case.spec, case.data("float32").params
    missing = {name: a for name, a in params.items() if name != "g.bias"}
    return {
        "missing parameter": lambda d: d.export(spec, missing),
        "unknown parameter": lambda d: d.export(spec, {**params, "g.scale": params["g.bias"]}),
        "parameter shape": lambda d: d.export(spec, {**params, "g.weight": params["g.weight"].T.copy()}),
    }


def _attention_calls(case: Case) -> dict[str, Call]:
    """Return calls for rows of the weights that must fail."""
    spec, data = case.spec, case.data("float32")
    return {
        "position": lambda d: d.attention(spec, data.params, data.x, [0, 35]),
        "negative position": lambda d: d.attention(spec, data.params, data.x, [-1]),
        "position dtype": lambda d: d.attention(spec, data.params, data.x, [0.5]),
        "position shape": lambda d: d.attention(spec, data.params, data.x, [[0]]),
    }


def _op_calls(_: Case) -> dict[str, Call]:
    """Return calls of the operation that must fail."""
    theta, phi, g = (np.ones((2, size, 5), np.float32) for size in (11, 7, 7))
    mask, weight = np.ones((2, 7), bool), np.ones(10, np.float32)
    concat = {"pairwise": "concatenation"}
    return {
        "form": lambda d: d.op(theta, phi, g, pairwise="cosine"),
        "form type": lambda d: d.op(theta, phi, g, pairwise=3),
        "scale": lambda d: d.op(theta, phi, g, scale=0.0),
        "scale name": lambda d: d.op(theta, phi, g, scale="inner"),
        "normalize": lambda d: d.op(theta, phi, g, normalize="softmax"),
        "function": lambda d: d.op(theta, phi, g, pairwise=lambda a, b: a @ b.mT),
        "no weight": lambda d: d.op(theta, phi, g, **concat),
        "weight shape": lambda d: d.op(theta, phi, g, **concat, concat_weight=weight[:5].copy()),
        "bias shape": lambda d: d.op(theta, phi, g, **concat, concat_weight=weight, concat_bias=weight),
        "mask is a list": lambda d: d.op(theta, phi, g, key_mask=[[True]]),
        "no keys": lambda d: d.op(theta, phi[:, :0].copy(), g[:, :0].copy()),
        "needless weight": lambda d: d.op(theta, phi, g, concat_weight=weight),
        "rank of theta": lambda d: d.op(theta[0], phi, g),
        "width of phi": lambda d: d.op(theta, phi[..., :4].copy(), g),
        "batch of phi": lambda d: d.op(theta, phi[:1].copy(), g),
        "keys of g": lambda d: d.op(theta, phi, g[:, :6].copy()),
        "mask of op": lambda d: d.op(theta, phi, g, key_mask=mask[:, :6].copy()),
        "mask dtype of op": lambda d: d.op(theta, phi, g, key_mask=mask.astype(np.int64)),
        "method of op": lambda d: d.op(theta, phi, g, method="fast"),
        "integers to op": lambda d: d.op(theta.astype(np.int64), phi, g),
    }


def outcome(call: Call, driver: Any) -> str:
    """Return the type and the words of the error that a call raises."""
    try:
        call(driver)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    except Exception as error:  # noqa: BLE001 - any other error is what the check reports
        return f"{type(error).__name__}: {error}"
    return "no error"


_CALLS = {"block": _block_calls, "export": _parameter_calls, "attention": _attention_calls, "op": _op_calls}


@check("errors", cases=lambda case: case.name == "embedded_gaussian_2d", every_dtype=False, by_reference=True)
def errors(driver: Any, case: Case, dtype: str) -> None:  # noqa: ARG001 - errors have no dtype
    """Wrong arguments raise the reference's TypeError or ValueError, word for word."""
    wrong = []
    for group, calls in _CALLS.items():
        if group != "block" and group not in driver.capabilities:
            continue
        for name, call in calls(case).items():
            expected, actual = outcome(call, NumpyDriver()), outcome(call, driver)
            require(expected.startswith(("TypeError: ", "ValueError: ")), f"{name}: the reference gave {expected}")
            if actual != expected:
                wrong.append(f"{name}:\n  expected {expected}\n  got      {actual}")
    require(not wrong, "\n".join(["these calls must fail as the reference does", *wrong]))
