"""The drivers of other implementations are honest: each check comes out as the tables here say, no better, no worse."""

import re
from pathlib import Path

import pytest

from nonlocal_conformance import Unsupported, run_checks
from nonlocal_conformance.drivers.torch import TorchDriver
from nonlocal_conformance.registry import bind
from nonlocal_conformance.runner import match_expected
from peers import SUBJECTS, load

PAGE = Path(__file__).parents[3] / "docs" / "peers.md"

CHECKS = {
    "forward",
    "gradients",
    "identity_at_start",
    "large_scores",
    "layouts",
    "permutation",
    "score_digits",
    "statistics",
}
"""The checks that find something and are fast; `make peers` runs all."""

INPLACE = "a ReLU writes over what the gradient needs"
VIEW = "it takes a view of its input, which must be contiguous"
HALF = "scores are stored in half precision"
LAYOUT = "z has a layout of its own"

ERRORS = {
    INPLACE: (RuntimeError, "modified by an inplace operation"),
    VIEW: (RuntimeError, "view size is not compatible"),
    HALF: (AssertionError, "must be finite where a score exceeds|exceeds its error bound by a factor"),
    LAYOUT: (AssertionError, "must have the layout of its input"),
}
"""From each reason to the error that shows it."""

UNSUPPORTED = (Unsupported, "`(pairwise|inner_channels)`")
"""What a driver raises for what its implementation has no option for."""

MMCV = {
    "gradients-concatenation*": INPLACE,
    "layouts-concatenation*": INPLACE,
    "large_scores": HALF,
    "score_digits": HALF,
}
SLOWFAST = {
    "large_scores-embedded_gaussian*": HALF,
    "large_scores-dot_product*": HALF,
    "score_digits-embedded_gaussian*": HALF,
}
FAILURES = {
    "peers.mmcv:NonLocal1d": MMCV,
    "peers.mmcv:NonLocal2d": MMCV | {"layouts-gaussian*": VIEW},
    "peers.mmcv:NonLocal3d": MMCV | {"layouts-gaussian*": VIEW},
    "peers.pytorchvideo:NonLocal": SLOWFAST,
    "peers.slowfast:Nonlocal": SLOWFAST,
    "peers.timm:NonLocalAttn": {
        "layouts-embedded_gaussian*": LAYOUT,
        "large_scores-embedded_gaussian*": HALF,
        "score_digits-embedded_gaussian*": HALF,
    },
    "peers.fastreid:NonLocal": {"layouts-dot_product_default*": LAYOUT},
}
"""What fails, and why; every check that a key matches must fail so."""

OTHERS = {
    "peers.pytorchvideo:NonLocal": "-(gaussian|concatenation)_",
    "peers.slowfast:Nonlocal": "-(gaussian|concatenation)_",
    "peers.timm:NonLocalAttn": "-(gaussian|dot_product|concatenation)_",
    "peers.fastreid:NonLocal": "-(gaussian|embedded_gaussian|concatenation)_|_half-|^(large_scores|score_digits)-",
}
"""The ids of what an implementation has no option for; what is not here must not be called unsupported."""


def is_other(address, name):
    """Return whether an implementation has no option for an id or the name of a case."""
    return address in OTHERS and re.search(OTHERS[address], name) is not None


def parameters():
    for address in SUBJECTS:
        driver = load(address)
        bound = [one for one in bind(driver) if one.check.name in CHECKS]
        reasons = match_expected(bound, FAILURES[address])
        for one in bound:
            error = UNSUPPORTED if is_other(address, one.id) else ERRORS.get(reasons.get(one.id))
            yield pytest.param(one, error, id=f"{driver.name}-{one.id}")


@pytest.mark.parametrize(("bound", "error"), list(parameters()))
def test_a_check_of_a_peer_comes_out_as_the_table_says(bound, error):
    if error is None:
        bound()
        return
    kind, message = error
    with pytest.raises(kind, match=message):
        bound()


@pytest.mark.parametrize("address", SUBJECTS)
def test_the_cases_of_a_peer_are_sound_for_they_pass_here(address):
    cases = tuple(case for case in load(address).cases if not is_other(address, f"-{case.name}"))
    settings = {"cases": cases, "methods": ("auto",), "capabilities": frozenset({"vjp", "hvp"})}
    results = run_checks(type("Own", (TorchDriver,), settings)(), on_failure="return")
    assert [result for result in results if result.outcome != "passed"] == []


@pytest.mark.parametrize("address", SUBJECTS)
def test_the_page_of_the_documentation_is_about_the_installed_version(address):
    driver = load(address)
    assert f"\n## {driver.package} {driver.version}: {driver.__doc__.rstrip('.')}\n" in PAGE.read_text(encoding="utf-8")
