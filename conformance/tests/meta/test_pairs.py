"""The covering array: what can meet, meets, and no case is so ill conditioned that a right implementation may fail."""

import dataclasses

import pytest
from condition import LARGEST, condition, is_alive
from covering import VALUES, meetings, wanted

import nonlocal_core as nlc
from nonlocal_conformance import CASES, CHECKS, CUTS, Case, pairs, registry
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
    assert is_alive(case)
    assert condition(case) <= LARGEST


def test_a_case_of_ones_own_is_well_conditioned_under_every_name():
    options = {"pairwise": "concatenation", "norm": "batch"}
    own = [Case(f"own_{number}", options, (7, 5), mask="some", training=True) for number in range(24)]
    assert max(map(condition, own)) <= LARGEST


def test_a_case_of_ones_own_has_weights():
    # Of the data of seed 0 under this name no pair is active.
    options = {"pairwise": "concatenation", "channels": 6, "inner_channels": 4}
    case = Case("concatenation_batch_evaluation_whole", options, (7, 5))
    data = case.data()
    assert nlc.attention(data.x, data.params, case.spec).any()


def test_a_seed_of_ones_own_is_kept():
    zero, one = (Case("own", {"norm": "batch"}, (7, 5), seed=seed).data() for seed in (0, 1))
    assert (zero.x != one.x).all()


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
