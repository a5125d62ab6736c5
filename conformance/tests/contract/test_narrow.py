"""The adapters as drivers that know float32 alone: no check may ask of it what only float64 gives."""

import copy

import pytest

from nonlocal_conformance import loader
from nonlocal_conformance.registry import bind

FRAMEWORKS = [driver for driver in loader.available()[0] if driver.name != "numpy"]
# Compiling and large inputs take long; that they agree in float32 is tested where they also run in both dtypes.
LONG = {"compiled", "memory", "many_positions", "sharded_memory"}


def narrow(driver):
    """Return a driver that is the same but for its dtypes."""
    driver = copy.copy(driver)
    driver.dtypes = ("float32",)
    return driver


def only_in_one_dtype():
    """Give what a float32-only driver runs and one with both dtypes does not."""
    for driver in FRAMEWORKS:
        known = {bound.id for bound in bind(driver)}
        for bound in bind(narrow(driver)):
            # Outside PyTorch a gradient of a gradient is slow: there the case on which rounding counts most.
            chosen = driver.name == "torch" or bound.id == "second_derivatives-groups_pooled_frames-float32"
            if bound.id not in known and bound.check.name not in LONG and chosen:
                yield pytest.param(bound, id=f"{driver.name}-{bound.id}")


@pytest.mark.parametrize("bound", list(only_in_one_dtype()))
def test_an_adapter_passes_in_float32_alone(bound):
    bound()
