"""Layers of a block that are others of the framework than those that the block has made."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import nonlocal_core as nlc
from nonlocal_conformance.assertions import assert_close, assert_names, require
from nonlocal_conformance.cases import Case
from nonlocal_conformance.checks.derivatives import assert_gradients
from nonlocal_conformance.checks.values import assert_output
from nonlocal_conformance.registry import check
from nonlocal_conformance.selection import first_of_each


def _has_gradients_in_evaluation(case: Case) -> bool:
    return case.is_differentiable and not case.training


_is_chosen = first_of_each(
    lambda case: _has_gradients_in_evaluation(case) and case.spec.norm is not None,
    lambda case: (case.spec.pairwise, case.is_pooled and case.spec.subsample_at),
)
"""One with a norm for each form and each place of the pooling: what an adapter fuses differs among them."""


@check("replaced", cases=_is_chosen, every_dtype=False)
def replaced_layers(driver: Any, case: Case, dtype: str) -> None:
    """A layer that gives twice as much in the place of another is called, differentiated and exported, or refused."""
    data, spec = case.data(dtype), case.spec
    for layer in (name for name in ("theta", "phi", "g", "out") if name in spec.layers):
        own = [name for name in data.params if name.partition(".")[0] == layer]
        twice = dataclasses.replace(data, params=data.params | {name: 2 * data.params[name] for name in own})
        wide = twice.wide()
        z, gradients, rows, export = driver.replaced(spec, data.params, data.x, data.dz, layer, data.key_mask)
        where = f" with twice {layer}"
        assert_output(f"z{where}", z, case, twice, dtype)
        dx, dparams = nlc.nonlocal_block_vjp(wide.x, wide.params, spec, wide.dz, wide.key_mask)
        expected = dx, dparams | {name: 2 * dparams[name] for name in own}
        assert_gradients(gradients, expected, dtype, terms=expected, where=where)
        weights = nlc.attention(wide.x, wide.params, spec, key_mask=wide.key_mask)
        assert_close(f"attention{where}", rows, weights, dtype=dtype)
        try:
            exported = export()
        except (TypeError, ValueError) as error:
            is_named = re.search(rf"\b{layer}\b", f"{error}") is not None
            require(is_named, f"the export{where} must be refused by its name, and says: {error}")
            continue
        assert_names(f"the export{where}", exported, twice.params)
        for name, array in wide.params.items():
            assert_close(f"{name} as exported{where}", exported[name], array, dtype=dtype)
