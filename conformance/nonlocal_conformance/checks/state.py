"""One live block in every state: called, trained, loaded, copied and frozen in any order."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import numpy as np

import nonlocal_core as nlc
from nonlocal_conformance.assertions import assert_close, assert_names, assert_same, require
from nonlocal_conformance.cases import Array, Case, Data
from nonlocal_conformance.checks.derivatives import assert_gradients, reference_gradients
from nonlocal_conformance.checks.values import assert_output, form
from nonlocal_conformance.registry import check, methods_of
from nonlocal_core.spec.parameters import STATISTICS

Params = dict[str, Array]


def _has_state(case: Case) -> bool:
    """Whether a case has running statistics, a mask and gradients: all that a block could keep."""
    return case.is_differentiable and case.spec.norm == "batch" and case.mask == "some" and not case.training


_of_each_form: dict[str, Any] = {"cases": _has_state, "first": form, "every_dtype": False}
_of_one_form: dict[str, Any] = {**_of_each_form, "first": lambda _: None}


@dataclasses.dataclass
class _Known:
    """A live block beside the reference, which is carried along.

    Args:
        driver: the driver.
        session: its live block.
        case: the case.
        data: its arrays, with the parameters that the block must have now.
        dtype: their dtype.
    """

    driver: Any
    session: Any
    case: Case
    data: Data
    dtype: str

    def call(self, what: str, x: Array, key_mask: Array | None = None, *, training: bool = False) -> None:
        """Call the block, and compare z and the statistics with the reference's."""
        case, data = self._at(x, key_mask, training)
        z, statistics = self.session.call(x, key_mask, training=training)
        assert_output(f"z {what}", z, case, data, self.dtype)
        self.compare_statistics(what, statistics, data, training=training)

    def vjp(self, what: str, x: Array, dz: Array, key_mask: Array | None = None, *, training: bool = False) -> None:
        """Differentiate the block, and compare the gradients and the statistics with the reference's."""
        case, data = self._at(x, key_mask, training)
        expected, terms = reference_gradients(case, dataclasses.replace(data, dz=dz).wide())
        z, statistics, *actual = self.session.gradients(x, dz, key_mask, training=training)
        assert_output(f"z with gradients {what}", z, case, data, self.dtype)
        assert_gradients((actual[0], actual[1]), expected, self.dtype, terms=terms, where=f" {what}")
        self.compare_statistics(what, statistics, data, training=training)

    def compare_statistics(self, what: str, actual: Params, data: Data, *, training: bool) -> None:
        """Compare the running statistics after a call, and take them over."""
        if training:
            wide, unbiased = data.wide(), self.driver.unbiased
            moved = nlc.updated_statistics(wide.x, wide.params, self.case.spec, wide.key_mask, unbiased=unbiased)
            for name in STATISTICS:
                assert_close(f"{name} {what}", actual[name], moved[name], dtype=self.dtype)
        else:
            for name in STATISTICS:
                assert_same(f"{name} {what}", actual[name], data.params[name])
        taken = {name: actual[name].copy() for name in STATISTICS}
        self.data = dataclasses.replace(self.data, params=self.data.params | taken)

    def compare_params(self, what: str) -> None:
        """Compare the parameters that the block gives out with those that it must have, bit for bit."""
        found = self.session.params()
        assert_names(f"the parameters {what}", found, self.data.params)
        for name, array in self.data.params.items():
            assert_same(f"{name} {what}", found[name], array)

    def beside(self, session: Any) -> _Known:
        """Return a copy of the block that is to be what this one is now."""
        return dataclasses.replace(self, session=session)

    def _at(self, x: Array, key_mask: Array | None, training: bool) -> tuple[Case, Data]:
        case = dataclasses.replace(self.case, training=training)
        return case, dataclasses.replace(self.data, x=x, key_mask=key_mask)


def _known(driver: Any, case: Case, dtype: str, *, method: str = "auto") -> _Known:
    data = case.data(dtype)
    session = driver.session(case.spec, {name: a.copy() for name, a in data.params.items()}, method=method)
    return _Known(driver, session, case, data, dtype)


def _others(case: Case, params: Params) -> Params:
    """Return other parameters of the same shapes and dtypes."""
    shift = np.random.default_rng(zlib.crc32(b"others " + case.name.encode())).uniform(1.25, 1.75)
    return {name: (a * shift).astype(a.dtype) for name, a in params.items()}


@check("session", **_of_each_form)
def calls_in_turn(driver: Any, case: Case, dtype: str) -> None:
    """What one block gives depends on its parameters and this call, not on masks, sizes and modes of those before."""
    known = _known(driver, case, dtype)
    x, mask = known.data.x, known.data.key_mask
    rng = np.random.default_rng(zlib.crc32(b"turns " + case.name.encode()))
    larger = rng.normal(size=(2, *(size + 2 for size in case.spatial), case.spec.channels)).astype(dtype)
    known.call("with a mask", x, mask)
    known.call("without the mask of the call before", x)
    known.call("of another size", larger)
    known.call("in training after an evaluation", x, mask, training=True)
    known.call("in evaluation after training, without the mask", x)
    known.call("in evaluation after training, with the mask", x, mask)
    known.call("in training on another size, without a mask", larger, training=True)
    known.call("with another mask", x, ~np.asarray(mask))
    known.compare_params("after calls")


@check("session", **_of_one_form)
def loaded_between_calls(driver: Any, case: Case, dtype: str) -> None:
    """Parameters taken in after calls and gradients are those that count; a refused load changes none of them."""
    known = _known(driver, case, dtype)
    x, dz, mask = known.data.x, known.data.dz, known.data.key_mask
    known.call("at first", x, mask)
    known.vjp("at first", x, dz, mask, training=True)
    new = _others(case, known.data.params)
    known.session.load({name: a.copy() for name, a in new.items()})
    known.data = dataclasses.replace(known.data, params=new)
    known.compare_params("after a load")
    known.call("after a load", x, mask)
    known.vjp("after a load", x, dz, mask, training=True)
    # The first is refused after all others were looked at, the last before.
    for name in (next(iter(new)), list(new)[-1]):
        wrong = _others(case, new) | {name: np.zeros((*new[name].shape, 2), dtype)}
        _assert_refused(known.session, wrong, f"{name} of a wrong shape")
        known.compare_params(f"after {name} of a wrong shape was refused")
    known.call("after a refused load", x, mask)


def _assert_refused(session: Any, params: Params, what: str) -> None:
    try:
        session.load(params)
    except Exception:  # noqa: BLE001 - in which words is held by the checks of errors
        return
    require(False, f"{what} must be refused")  # noqa: FBT003 - it was not


@check("session", **_of_one_form)
def copied_blocks(driver: Any, case: Case, dtype: str) -> None:
    """A copy of a trained block is what the block is, and from then on neither changes the other."""
    known = _known(driver, case, dtype)
    x, dz, mask = known.data.x, known.data.dz, known.data.key_mask
    known.vjp("before the copy", x, dz, mask, training=True)
    for way in known.session.copies():
        other = known.beside(known.session.copies()[way])
        other.compare_params(f"of the copy by {way}")
        other.call(f"of the copy by {way}", x, mask)
        known.call(f"beside the copy by {way}, in training", x, mask, training=True)
        other.compare_params(f"of the copy by {way} after the block was trained")
        other.call(f"of the copy by {way} in training", x, training=True)
        known.compare_params(f"after the copy by {way} was trained")
        new = _others(case, known.data.params)
        other.session.load(new)
        other.data = dataclasses.replace(other.data, params=new)
        known.compare_params(f"after the copy by {way} was loaded")
        known.call(f"after the copy by {way} was loaded", x, mask)
        other.call(f"of the copy by {way} after it was loaded", x, mask)


@check("session", **_of_one_form)
def arrays_of_the_caller(driver: Any, case: Case, dtype: str) -> None:
    """Arrays that were given to a block or came from it can be written to afterwards, and nothing else changes."""
    data, params = case.data(dtype), case.data(dtype).params
    known = _Known(driver, driver.session(case.spec, params), case, data, dtype)
    _overwrite(*params.values())
    known.compare_params("after the arrays of its parameters were changed")
    new = _others(case, data.params)
    known.session.load(new)
    known.data = dataclasses.replace(data, params=_others(case, data.params))
    _overwrite(*new.values())
    known.compare_params("after the arrays that were loaded were changed")
    _overwrite(*known.session.params().values())
    known.compare_params("after the arrays that it gave out were changed")
    x, dz, mask = data.x.copy(), data.dz.copy(), np.array(data.key_mask)
    z, statistics = known.session.call(x, mask)
    _, _, dx, dparams = known.session.gradients(x, dz, mask)
    results = {"z": z, "dx": dx} | {f"d{name}": d for name, d in dparams.items()}
    kept = {name: np.array(a) for name, a in results.items()}
    _overwrite(*statistics.values())
    known.compare_params("after the statistics that it gave out were changed")
    _overwrite(dz, x)
    np.logical_not(mask, out=mask)
    for name, a in kept.items():
        assert_same(f"{name} after the arrays of its call were changed", results[name], a)
    # The same objects with other numbers in them are other arguments.
    x[...], dz[...] = data.dz, data.x
    known.call("of arrays whose numbers have changed", x, mask)
    known.vjp("of arrays whose numbers have changed", x, dz, mask)


def _overwrite(*arrays: Array) -> None:
    """Write into arrays that can be written to."""
    for a in arrays:
        if a.flags.writeable:
            a[...] = 3


@check("session", **_of_one_form)
def repeated_gradients(driver: Any, case: Case, dtype: str) -> None:
    """A second gradient of the same call is the first once more, and other calls between them change nothing."""
    known = _known(driver, case, dtype)
    x, dz, mask = known.data.x, known.data.dz, known.data.key_mask
    known.vjp("at first", x, dz, mask)
    known.vjp("for the same dz", x, dz, mask)
    known.vjp("for twice dz", x, 2 * dz, mask)
    known.vjp("without the mask", x, dz)
    known.call("between gradients", dz, mask)
    known.vjp("after another call", x, dz, mask)


@check("session", "vjp", **_of_each_form)
def frozen_parameters(driver: Any, case: Case, dtype: str) -> None:
    """Parameters of which no gradient is asked, some or all, change no gradient of the others or of the input."""
    names = [name for name in nlc.param_shapes(case.spec) if name not in STATISTICS]
    data = case.data(dtype)
    expected, terms = reference_gradients(case, data.wide())
    for method in methods_of(driver, case.spec):
        for what, frozen in (("every second one", names[::2]), ("all of them", names)):
            session = driver.session(case.spec, data.params, method=method)
            session.freeze(frozen)
            _, _, *actual = session.gradients(data.x, data.dz, data.key_mask)
            left = expected[0], {name: d for name, d in expected[1].items() if name not in frozen}
            assert_gradients(
                (actual[0], actual[1]), left, dtype, terms=terms, where=f" with {what} frozen, by method {method!r}"
            )
