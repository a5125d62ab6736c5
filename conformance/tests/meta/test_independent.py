"""Right implementations written apart from this project's pass: the suite asks for no more than the specification."""

import collections
import dataclasses

import pytest
from as_published import AlexHex7, SlowFast
from from_specification import Driver

from nonlocal_conformance import CASES, run_checks


class Wide(Driver):
    """The block from the specification in float64 alone."""

    name = "from_specification_float64"
    dtypes = ("float64",)


class Narrow(Driver):
    """The same in float32 alone, without what takes long: the checks that ask for a case of every dtype."""

    name = "from_specification_float32"
    dtypes = ("float32",)
    cases = tuple(dataclasses.replace(case, narrow=False) for case in CASES.values())


DRIVERS = [Wide(), Narrow(), *map(AlexHex7, (1, 2, 3)), SlowFast()]


@pytest.mark.parametrize("driver", DRIVERS, ids=lambda one: f"{one.name}{getattr(one, 'dimension', '')}")
def test_an_implementation_written_apart_passes_every_check(driver):
    outcomes = collections.Counter(result.outcome for result in run_checks(driver))
    assert outcomes.keys() == {"passed"}
    assert outcomes["passed"] > 200
