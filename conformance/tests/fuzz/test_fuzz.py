"""A little of `make fuzz`: changed files are read or refused, and random blocks are computed as the reference does."""

import files
import pytest
import specs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nonlocal_conformance import loader
from nonlocal_conformance.cases import CASES
from nonlocal_conformance.drivers.numpy import NumpyDriver

DRIVERS = [driver for driver in loader.available()[0] if driver.name != "numpy"]


@pytest.mark.parametrize("name", files.READERS)
@settings(max_examples=40, derandomize=True)
@given(number=st.integers(0, 2**31))
def test_a_changed_file_is_read_whole_or_refused(name, number, tmp_path_factory):
    assert files.outcome(name, number, tmp_path_factory.getbasetemp() / "changed") in {"read", "refused"}


@pytest.mark.parametrize("name", files.READERS)
def test_a_whole_file_is_read(name, tmp_path, monkeypatch):
    for content in files.seeds_of(name):
        monkeypatch.setattr(files, "changed", lambda *_, content=content: content)
        assert files.outcome(name, 0, tmp_path / "whole") == "read"


@pytest.mark.parametrize(
    ("read", "holds", "seconds", "found"),
    [
        (lambda _: 1 / 0, bool, 99, "undocumented ZeroDivisionError"),
        (bool, lambda _: False, 99, "half"),
        (lambda _: [bytearray(2**22) for _ in range(99)], bool, 99, "memory"),
        (bool, bool, -99, "slow"),
    ],
    ids=["type", "half", "memory", "time"],
)
def test_a_reader_that_does_not_keep_its_promises_is_found(read, holds, seconds, found, tmp_path, monkeypatch):
    monkeypatch.setitem(files.READERS, "weights", files.Reader(read, files.weights, holds, 4))
    monkeypatch.setattr(files, "SECONDS", seconds)
    assert files.outcome("weights", 1, tmp_path / "file").startswith(found)


@pytest.mark.parametrize("driver", [specs.driver_of("numpy"), *DRIVERS], ids=lambda driver: driver.name)
@settings(max_examples=8, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_random_block_computes_the_same_whatever_its_mask_method_and_dtype(driver, data):
    specs.agree(driver, *data.draw(specs.calls(driver)))


class Doubled(NumpyDriver):
    """A driver that is wrong."""

    def block(self, *given, **options):
        z, statistics = super().block(*given, **options)
        return 2 * z, statistics


def test_a_program_repeats_what_differs():
    text = specs.program(NumpyDriver(unbiased=True), CASES["some_bias"], "float64", "auto", None)
    exec(text, {})  # noqa: S102 - it compares once more, and finds the same
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(specs, "driver_of", lambda _: Doubled(unbiased=True))
        with pytest.raises(AssertionError, match="z"):
            exec(text, {})  # noqa: S102
