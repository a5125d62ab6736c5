"""The covering array: what can meet, meets, and no case is so ill conditioned that a right implementation may fail."""

import dataclasses

import pytest
from condition import LARGEST, condition
from covering import VALUES, meetings, wanted

from nonlocal_conformance import CASES, CHECKS, CUTS, pairs, registry
from nonlocal_conformance.drivers.numpy import NumpyDriver

ROWS = [{name: row[name] for name in VALUES} for row in pairs.rows()]
DIFFERENTIABLE = [pytest.param(case, id=name) for name, case in (CASES | CUTS).items() if case.is_differentiable]


def missing(rows):
    """Return what can meet and does not."""
    return wanted() - frozenset().union(*map(meetings, rows))


def test_every_pair_of_values_and_every_triple_of_what_interacts_meets_in_a_case():
    assert not missing(ROWS)


def test_without_a_row_something_does_not_meet():
    assert missing(ROWS[1:])


def test_what_is_wanted_is_met_by_no_combination_that_cannot_be():
    assert frozenset([("rank", "1"), ("sets", "space")]) not in wanted()
    assert frozenset([("rank", "3"), ("sets", "space")]) in wanted()
    assert frozenset([("form kind", "concatenation"), ("sets kind", "groups"), ("pooling kind", "input")]) in wanted()


@pytest.mark.parametrize("case", DIFFERENTIABLE)
def test_a_case_is_well_conditioned(case):
    assert condition(case) <= LARGEST


def test_a_driver_runs_every_check_on_cases_of_its_own_whatever_their_names_are():
    class Own(NumpyDriver):
        is_reference = True
        cases = tuple(dataclasses.replace(case, name=f"own_{n}") for n, case in enumerate(CASES.values()))

    own, suite = (
        [(bound.check.name, bound.dtype) for bound in registry.bind(driver)] for driver in (Own(), NumpyDriver())
    )
    assert own == suite


def test_every_check_runs_in_more_dtypes_than_the_widest_if_it_says_so():
    narrow = {bound.check.name for bound in registry.bind(NumpyDriver()) if bound.dtype == "float32"}
    wide = {bound.check.name for bound in registry.bind(NumpyDriver())}
    assert {name for name in wide if CHECKS[name].every_dtype} == narrow
