"""The suite itself: its cases, its assertions, its drivers, and the three ways to run it."""

import collections
import inspect
import itertools
import math
import sys
from importlib.metadata import entry_points
from typing import Protocol

import numpy as np
import pytest
from textbook import Textbook

import nonlocal_core as nlc
from nonlocal_conformance import (
    CASES,
    CHECKS,
    CUTS,
    ConformanceError,
    Unsupported,
    assertions,
    cases,
    driver,
    loader,
    memory,
    parametrize_with_checks,
    registry,
    run_checks,
)
from nonlocal_conformance.capabilities import BACKENDS, CAPABILITIES
from nonlocal_conformance.drivers.numpy import NumpyDriver
from nonlocal_core.commands import program
from nonlocal_core.geometry import cut, windows_of

pytest_plugins = ["pytester"]

DRIVERS = [pytest.param(one, id=one.name) for one in loader.available()[0]]
PROTOCOLS = [kind for kind in vars(driver).values() if getattr(kind, "_is_protocol", False) and kind is not Protocol]
METHODS = {
    name: method for kind in PROTOCOLS for name, method in vars(kind).items() if name in {"block", *CAPABILITIES}
}
EVERY_CASE = [pytest.param(case, id=case.name) for case in CASES.values()]


class Small(NumpyDriver):
    """The reference on two cases, without the checks that take long."""

    cases = (CASES["dot_product_2d"], CASES["affine"])
    capabilities = frozenset({"op", "export"})


class Shifted(Small):
    """Wrong in every output."""

    def block(self, *args, **options):
        z, statistics = super().block(*args, **options)
        return z + 1, statistics


class WithoutNorm(Small):
    """Unable to express a norm."""

    def block(self, spec, *args, **options):
        if spec.norm:
            message = "there is no norm"
            raise Unsupported(message)
        return super().block(spec, *args, **options)


class Crashing(Small):
    """Unable to do anything."""

    def op(self, *_, **__):
        return 1 / 0


class Nothing(Small):
    """Unable to express any case."""

    cases = (CASES["affine"],)
    capabilities = frozenset({"op", "train"})

    def block(self, *_, **__):
        message = "there is no block"
        raise Unsupported(message)

    op = train = block


def outcomes(results):
    return collections.Counter(result.outcome for result in results)


# run_checks


@pytest.mark.parametrize(
    "capability", sorted(CAPABILITIES.keys() - {"large", "functions", "errors", "casts", "uneven"})
)
def test_a_capability_has_a_protocol(capability):
    assert capability in METHODS


@pytest.mark.parametrize("one", [*DRIVERS, pytest.param(Textbook(), id="textbook")])
def test_the_methods_of_a_driver_have_the_arguments_of_the_protocols(one):
    for name in {"block", *one.capabilities} & METHODS.keys():
        found, wanted = (
            [(p.name, p.kind, p.default) for p in inspect.signature(method).parameters.values()]
            for method in (getattr(type(one), name), METHODS[name])
        )
        assert found == wanted, name


def test_a_run_returns_one_result_for_each_check_in_their_order():
    results = run_checks(Small())
    assert [result.id for result in results] == [bound.id for bound in registry.bind(Small())]
    assert outcomes(results) == {"passed": len(results)}


def test_a_run_raises_what_went_wrong_at_its_end():
    with pytest.raises(ConformanceError, match=r"(?s)failed: forward-dot_product_2d-float64: .*failed: .*-affine-"):
        run_checks(Shifted())


def test_a_run_can_return_what_went_wrong():
    results = run_checks(Shifted(), on_failure="return")
    wrong = [result for result in results if result.is_wrong]
    assert {result.check for result in wrong} >= {"forward", "methods"}
    assert all(result.message.startswith("AssertionError: z") for result in wrong)


def test_a_run_gives_each_result_as_it_comes():
    seen = []
    results = run_checks(Shifted(), on_failure="return", on_result=seen.append)
    assert seen == results


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_shows_how_far_it_is_on_a_terminal_only(terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("COLUMNS", "40")
    results = run_checks(Small())
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.split("\r")
    assert {len(line) for line in lines} == ({0, 39} if terminal else {0})
    shown = [f"{number} of {len(results)}: {one.id}"[:39] for number, one in enumerate(results, 1)]
    assert [line.rstrip() for line in lines if line.strip()] == (shown if terminal else [])
    assert lines[-2:] == ([" " * 39, ""] if terminal else [""])


def test_an_error_of_an_implementation_is_a_failure_with_its_name():
    messages = {result.message for result in run_checks(Crashing(), on_failure="return") if result.is_wrong}
    assert messages == {"ZeroDivisionError: division by zero"}


def test_what_cannot_be_expressed_is_no_failure_and_gives_its_reason():
    results = run_checks(WithoutNorm())
    assert {result.message for result in results if result.outcome == "unsupported"} == {"there is no norm"}
    assert outcomes(results)["passed"] > 0
    assert not any(result.is_wrong for result in results)


OPERATIONS = ["dot_product_2d-float64", "dot_product_2d-float32", "affine-float64"]


@pytest.mark.parametrize(
    ("keys", "failed"),
    [
        (["operation"], OPERATIONS),
        (["operation-*"], OPERATIONS),
        (["operation-dot_product_2d-float64", "operation-*32"], OPERATIONS[:2]),
        (["operation-*-float6?"], OPERATIONS[::2]),
    ],
    ids=["name", "pattern", "id and pattern", "part"],
)
def test_an_expected_failure_is_one_with_its_reason(keys, failed):
    reasons = dict.fromkeys(keys, "op is not written yet")
    results = run_checks(Crashing(), expected_failures=reasons, on_failure="return")
    found = [result for result in results if result.outcome == "expected failure"]
    assert [result.id for result in found] == [f"operation-{name}" for name in failed]
    assert {result.message for result in found} == {"op is not written yet"}
    assert outcomes(results)["failed"] == len(OPERATIONS) - len(failed)


def test_an_expected_failure_that_passes_is_wrong():
    with pytest.raises(ConformanceError, match="unexpected pass: forward-affine-float64: it was expected to fail: no"):
        run_checks(Small(), expected_failures={"forward-affine-*": "no idea"})


@pytest.mark.parametrize("key", ["fast_forward", "forward-no_such_case-float64", "second_derivatives", "FORWARD"])
def test_an_expected_failure_must_match_a_check_that_runs(key):
    with pytest.raises(ValueError, match=f"`expected_failures` must name checks that run. Got '{key}'"):
        run_checks(Small(), expected_failures={key: "who knows"})


@pytest.mark.parametrize("reason", ["", "  ", None, True])
def test_an_expected_failure_must_have_a_reason(reason):
    with pytest.raises(ValueError, match="`expected_failures` must give a reason for 'forward'"):
        run_checks(Small(), expected_failures={"forward": reason})


def test_a_run_in_which_nothing_was_tested_fails():
    with pytest.raises(ConformanceError, match="Nothing was tested"):
        run_checks(Nothing())
    assert set(outcomes(run_checks(Nothing(), on_failure="return"))) == {"unsupported"}


def test_a_result_has_the_processor_time_that_it_took():
    seconds = [result.seconds for result in run_checks(Small())]
    assert min(seconds) >= 0
    assert 0 < sum(seconds) < 60


def test_the_checks_without_a_case_are_those_of_the_capabilities_alone():
    absent = registry.without_case(Nothing())
    assert {"statistics", "errors", "gradients"} & set(absent) == {"statistics"}
    assert not set(absent) & {bound.check.name for bound in registry.bind(Nothing())}


def test_what_follows_a_failure_must_be_one_of_two_words():
    with pytest.raises(ValueError, match="`on_failure` must be one of 'raise', 'return'"):
        run_checks(Shifted(), on_failure="ignore")


# parametrize_with_checks

TESTS_OF_ONES_OWN = """
import test_suite_drivers as drivers
from nonlocal_conformance import parametrize_with_checks

@parametrize_with_checks(drivers.{driver}(), expected_failures={expected})
def test_my_block(check):
    check()
"""

DRIVERS_OF_ONES_OWN = """
from nonlocal_conformance import CASES, Unsupported
from nonlocal_conformance.drivers.numpy import NumpyDriver

class Small(NumpyDriver):
    name = "small"
    cases = (CASES["dot_product_2d"], CASES["affine"])
    capabilities = frozenset({"op", "export"})

class Crashing(Small):
    name = "crashing"
    def op(self, *_, **__):
        return 1 / 0

class WithoutNorm(Small):
    name = "without"
    def block(self, spec, *args, **options):
        if spec.norm:
            raise Unsupported("there is no norm")
        return super().block(spec, *args, **options)

class Nothing(Small):
    name = "nothing"
    cases = (CASES["affine"],)
    capabilities = frozenset({"train"})
    def block(self, *_, **__):
        raise Unsupported("there is no block")
    train = block
"""


@pytest.fixture
def own(pytester, monkeypatch):
    """Return a folder with drivers of one's own, and no settings of this project."""
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:cacheprovider")
    pytester.makepyfile(test_suite_drivers=DRIVERS_OF_ONES_OWN)
    pytester.syspathinsert()
    return pytester


def count(driver):
    """Return how many checks apply to a driver."""
    return len(registry.bind(driver()))


def test_ones_own_test_runs_once_for_each_check(own):
    own.makepyfile(TESTS_OF_ONES_OWN.format(driver="Small", expected={}))
    own.runpytest().assert_outcomes(passed=count(Small))


def test_ones_own_test_fails_with_its_implementation(own):
    own.makepyfile(TESTS_OF_ONES_OWN.format(driver="Crashing", expected={}))
    result = own.runpytest()
    result.stdout.fnmatch_lines(["FAILED *test_my_block?operation-dot_product_2d-float64?*"])
    result.assert_outcomes(failed=3, passed=count(Crashing) - 3)


def test_ones_own_test_expects_failures(own):
    own.makepyfile(TESTS_OF_ONES_OWN.format(driver="Crashing", expected={"operation": "later"}))
    own.runpytest().assert_outcomes(xfailed=3, passed=count(Crashing) - 3)


def test_ones_own_expected_failures_are_strict(own):
    own.makepyfile(TESTS_OF_ONES_OWN.format(driver="Small", expected={"operation": "later"}))
    own.runpytest().assert_outcomes(failed=3, passed=count(Small) - 3)


def test_ones_own_test_skips_what_cannot_be_expressed(own):
    own.makepyfile(TESTS_OF_ONES_OWN.format(driver="WithoutNorm", expected={}))
    result = own.runpytest("-rs")
    result.stdout.fnmatch_lines(["SKIPPED*there is no norm"])
    skipped = outcomes(run_checks(WithoutNorm()))["unsupported"]
    result.assert_outcomes(skipped=skipped, passed=count(WithoutNorm) - skipped)


def test_ones_own_test_fails_at_its_last_case_where_nothing_was_tested(own):
    own.makepyfile(TESTS_OF_ONES_OWN.format(driver="Nothing", expected={}))
    result = own.runpytest()
    result.stdout.fnmatch_lines(["*Nothing was tested: *"])
    result.stdout.fnmatch_lines(["*1 failed, * skipped*"])


def test_ones_own_test_must_name_checks_that_run():
    with pytest.raises(ValueError, match="`expected_failures` must name checks that run"):
        parametrize_with_checks(Small(), expected_failures={"forwards": "typo"})


# The plugin and the command


@pytest.fixture
def run_plugin(own):
    """Return a function that runs the plugin on drivers, with a test that takes every check."""
    own.makepyfile("def test_check(bound_check):\n    bound_check()")
    return lambda *options: own.runpytest("-p", "nonlocal_conformance.plugin", *options)


def backend(*names):
    return [option for name in names for option in ("--backend", f"test_suite_drivers:{name}")]


def test_the_plugin_runs_every_check_of_each_backend(run_plugin):
    result = run_plugin(*backend("Small", "WithoutNorm"))
    skipped = outcomes(run_checks(WithoutNorm()))["unsupported"]
    result.assert_outcomes(passed=2 * count(Small) - skipped, skipped=skipped)


def test_the_plugin_says_what_is_tested(run_plugin):
    result = run_plugin(*backend("Small"), "--collect-only", "-q", "-v")
    result.stdout.fnmatch_lines(
        [
            f"non-local conformance: specification {nlc.SPECIFICATION_VERSION}, nonlocal-core {nlc.__version__}",
            f"backend small {np.__version__} on cpu",
            "*test_check?small-forward-dot_product_2d-float64?*",
        ]
    )


def test_the_plugin_prints_what_came_of_the_cases_of_each_backend(run_plugin):
    result = run_plugin(*backend("Small", "WithoutNorm", "Crashing"))
    header = "check * passed   failed   expected failure   not expressible"
    result.stdout.fnmatch_lines(
        [
            *("*: cases of small *", header, "forward * 3 * - * - * -", "no case: *"),
            *("*: cases of without *", header, "forward * 2 * - * - * 1"),
            *("*: cases of crashing *", header, "operation * - * 3 * - * -"),
        ]
    )
    start = next(number for number, text in enumerate(result.outlines) if "cases of small" in text)
    assert (
        max(map(len, itertools.takewhile(lambda text: "short test summary" not in text, result.outlines[start:]))) <= 80
    )


def test_the_plugin_prints_what_took_the_time(run_plugin):
    lines = run_plugin(*backend("Small")).outlines
    start = next(number for number, text in enumerate(lines) if text.endswith(" s of processor time, most of it in:"))
    seconds = [float(text.split()[1]) for text in lines[start + 1 : start + 6]]
    assert seconds == sorted(seconds, reverse=True)


def test_a_run_of_the_plugin_in_which_nothing_was_tested_fails(run_plugin):
    result = run_plugin(*backend("Nothing"))
    result.stdout.fnmatch_lines(["Nothing was tested: *"])
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert run_plugin(*backend("Nothing", "Small")).ret == pytest.ExitCode.OK


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backend", "nowhere"], "*`backend` must be one of *'numpy'*Got 'nowhere'.*"),
        (["--backend", "no_such_module:Driver"], "*'no_such_module:Driver' cannot be imported*no_such_module*"),
        (["--backend", "test_suite_drivers:Driver"], "*`backend` must name a driver class that exists*"),
        (["--backend", "numpy", "--device", "cuda"], "*`device` must be 'cpu' for the backend 'numpy'. Got 'cuda'.*"),
        (["--backend", "torch", "--device", "nowhere"], "*nowhere*"),
        (["--device", "nowhere"], "*`--device` must be one that a backend has. Got 'nowhere'.*"),
        ([*backend("Small", "Crashing"), "--expected-failures", "f"], "*must go with one --backend. Got 2 backends.*"),
        ([*backend("Small"), "--expected-failures", "f"], "*No such file*"),
    ],
)
def test_what_the_plugin_is_told_to_test_must_be_there(run_plugin, options, message):
    result = run_plugin(*options)
    result.stderr.fnmatch_lines([message])
    assert result.ret == pytest.ExitCode.USAGE_ERROR


def test_the_plugin_reads_expected_failures_from_a_file(run_plugin, own):
    own.makefile(".txt", expected="# missing\n\noperation-*-float64  # later\noperation-*-float32 # later still")
    run_plugin(*backend("Crashing"), "--expected-failures", "expected.txt").assert_outcomes(
        xfailed=3, passed=count(Crashing) - 3
    )


def test_the_expected_failures_of_the_plugin_are_strict(run_plugin, own):
    own.makefile(".txt", expected="operation # later")
    run_plugin(*backend("Small"), "--expected-failures", "expected.txt").assert_outcomes(
        failed=3, passed=count(Small) - 3
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("operation", "*must give a reason after '#'. Got 'operation' on line 1 of *"),
        ("forward # why\nforwards # typo", "*must name checks that run. Got 'forwards'*"),
    ],
)
def test_a_file_of_expected_failures_must_be_complete(run_plugin, own, text, message):
    own.makefile(".txt", expected=text)
    result = run_plugin(*backend("Small"), "--expected-failures", "expected.txt")
    result.stderr.fnmatch_lines([message])
    assert result.ret == pytest.ExitCode.USAGE_ERROR


def test_the_plugin_does_not_load_itself(own):
    own.makepyfile("def test_nothing():\n    pass")
    result = own.runpytest("--backend", "numpy")
    result.stderr.fnmatch_lines(["*unrecognized arguments: --backend*"])
    plugins = entry_points(group="pytest11")
    assert plugins.names
    assert not [plugin for plugin in plugins if plugin.value.startswith("nonlocal")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "Got 'nowhere'."),
        (["numpy", "--device", "cuda"], "`device` must be 'cpu' for the backend 'numpy'. Got 'cuda'."),
    ],
)
def test_what_the_command_is_told_to_test_must_be_there(arguments, message, capsys):
    assert program.main(["conformance", *arguments]) == 2
    assert capsys.readouterr().err.rstrip().endswith(message)


# Drivers and capabilities


class Misspelt(Small):
    capabilities = frozenset({"vpj"})


class Boastful(Small):
    capabilities = frozenset({"hvp"})


class Half(Small):
    dtypes = ("float32", "float16")


class Bare:
    dtypes = ("float64",)


@pytest.mark.parametrize(
    ("driver", "error", "words"),
    [
        (Misspelt(), ValueError, "`capabilities` must be some of vjp, .* Got 'vpj'; near names: .*'vjp'"),
        (Half(), ValueError, "`dtypes` must be some of float64, float32; others are `mixed_dtypes`. Got 'float16'"),
        (Boastful(), TypeError, "`driver` must have a method for each of its capabilities. Got none for 'hvp'"),
        (Bare(), TypeError, r"`driver` must have .* Got Bare without \['name', 'methods', 'capabilities', 'block'\]"),
        (Small, TypeError, "`driver` must be an instance of a driver class"),
        ("jax", TypeError, "`driver` must have the attributes of a driver. Got str without"),
    ],
    ids=["capability", "dtype", "method", "attributes", "class", "name"],
)
def test_a_driver_that_would_lose_checks_is_refused(driver, error, words):
    with pytest.raises(error, match=words):
        run_checks(driver)


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_driver_declares_capabilities_that_exist_and_has_their_methods(driver):
    assert driver.capabilities <= CAPABILITIES.keys()
    named = driver.capabilities - {"errors", "functions", "large", "casts", "uneven"}
    assert not {name for name in named if not callable(getattr(driver, name, None))}


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_driver_says_what_it_is(driver):
    assert all(isinstance(text, str) and text for text in (driver.name, driver.version, driver.device))
    assert "auto" in driver.methods
    assert {*map(np.dtype, driver.dtypes)} <= {np.dtype("float64"), np.dtype("float32")}
    assert isinstance(driver.unbiased, bool)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_of_this_project_declares_capabilities_that_exist(name):
    assert BACKENDS[name] <= CAPABILITIES.keys()


@pytest.mark.parametrize("capability", sorted(CAPABILITIES.keys() - {"functions", "uneven"}))
def test_a_capability_is_needed_by_a_check(capability):
    assert any(capability in check.needs for check in CHECKS.values())


# Checks and cases


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_a_check_has_a_name_a_sentence_and_cases(check):
    assert check.name.isidentifier()
    assert check.run.__doc__.endswith(".")
    assert check.needs <= CAPABILITIES.keys()
    assert any(map(check.applies, [*CASES.values(), *CUTS.values()]))


def test_the_ids_of_the_checks_are_unique():
    ids = [bound.id for bound in registry.bind(NumpyDriver())]
    assert len(set(ids)) == len(ids)
    assert all(one.count("-") == 2 for one in ids)


def test_the_reference_is_not_compared_with_itself():
    assert not any(bound.check.by_reference for bound in registry.bind(NumpyDriver()))


def test_a_driver_made_from_that_of_the_reference_is_compared_with_it():
    derived = type("Derived", (NumpyDriver,), {})()
    compared = {bound.check.name for bound in registry.bind(derived) if bound.check.by_reference}
    assert compared == {check.name for check in CHECKS.values() if check.by_reference}


def test_the_checks_of_a_case_run_one_after_the_other():
    names = [bound.case.name for bound in registry.bind(NumpyDriver())]
    assert len([name for name, _ in itertools.groupby(names)]) == len(set(names))


def test_no_two_cases_have_one_name():
    made = cases._cases()  # noqa: SLF001 - a name that was given twice is lost in the mapping
    assert len(made) == len(CASES)


@pytest.mark.parametrize("case", EVERY_CASE)
def test_a_case_has_data_in_which_nothing_is_trivial(case):
    data, spec = case.data(), case.spec
    assert {name: a.shape for name, a in data.params.items()} == nlc.param_shapes(spec)
    assert all(np.all(a != 0) for a in data.params.values())
    assert len({a.tobytes() for a in data.params.values()}) == len(data.params)
    assert np.ptp(data.x) > 0
    assert np.ptp(data.dz) > 0
    spec.check_input(data.x.shape, training=case.training)


@pytest.mark.parametrize("case", [one for one in EVERY_CASE if "_pairs_" not in one.id])
def test_a_named_case_has_sizes_that_cannot_be_mistaken_for_each_other(case):
    sizes = (case.batch, *case.spatial, case.spec.channels, case.spec.inner_channels)
    equal = {"one_position": 1}.get(case.name, 0)
    assert len(set(case.spatial)) == len(case.spatial) - equal
    assert case.spec.channels != case.spec.inner_channels
    assert math.prod(case.spatial) not in {case.batch, case.spec.channels, case.spec.inner_channels}
    assert all(size > 0 for size in sizes)


@pytest.mark.parametrize("case", EVERY_CASE)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_data_of_a_case_are_the_same_on_every_call(case, dtype):
    first, second = case.data(dtype), case.data(dtype)
    for a, b in zip((first.x, first.dz), (second.x, second.dz), strict=True):
        assertions.assert_same("data", b, a)
        assert a.dtype == dtype
    for name, array in first.params.items():
        assertions.assert_same(name, second.params[name], array)
        assert array.dtype == dtype


@pytest.mark.parametrize("case", EVERY_CASE)
def test_the_wide_data_of_a_case_are_the_same_numbers(case):
    narrow = case.data("float32")
    assertions.assert_same("x", narrow.wide().x, narrow.x.astype("float64"))


def test_cases_differ_in_their_data():
    same_shape = [CASES[f"{form}_2d"].data().x for form in ("gaussian", "dot_product", "concatenation")]
    assert len({x.tobytes() for x in same_shape}) == 3


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in CASES.values() if c.mask])
def test_a_masked_case_has_a_sample_without_keys_and_others_with_some_or_none(case):
    mask = case.data().key_mask
    assert mask.dtype == bool
    assert case.batch == 1 or not mask[-1].any()
    some = [sample.any() and not sample.all() for sample in mask[: max(case.batch - 1, 1)]]
    assert all(some) if case.mask == "some" else not mask.any()


def windows(case):
    """Return the values of x in each window, (B', M, K, C)."""
    sets = case.spec.sets(case.spatial)
    return windows_of(np, cut(np, case.data().x, sets), sets)


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c.name) for c in CASES.values() if c.ties and c.is_pooled and windows(c).shape[2] > 1],
)
def test_a_case_with_ties_has_windows_whose_largest_value_is_there_twice(case):
    found = windows(case)
    assert ((found == found.max(axis=2, keepdims=True)).sum(axis=2) > 1).any()
    # Whole positions are equal too, and their projections: a few bits are exact in any order of the sum.
    assert (found[:, :, 1:] == found[:, :, :-1]).all(axis=-1).any()
    narrow = case.data("float32")
    for name in ("phi.weight", "g.weight"):
        if name in narrow.params:
            weight = narrow.params[name]
            assert np.array_equal(narrow.x @ weight.T, narrow.x.astype("float64") @ weight.astype("float64").T)


@pytest.mark.parametrize("option", ["subsample_at", "axes", "norm", "bias", "scale", "residual", "group_size"])
def test_every_option_has_cases_in_more_than_one_of_its_values(option):
    assert len({str(getattr(case.spec, option)) for case in CASES.values()}) > 1


# Assertions

CLOSE = np.linspace(1.0, 2.0, 6).reshape(2, 3)


@pytest.mark.parametrize(
    ("actual", "message"),
    [
        (CLOSE.tolist(), "y must be a NumPy array, and is list"),
        (CLOSE[:, :2], r"y must have shape \(2, 3\), and has \(2, 2\)"),
        (CLOSE[None], r"y must have shape \(2, 3\), and has \(1, 2, 3\)"),
        (CLOSE.astype("float32"), "y must have dtype float64, and has float32"),
        (np.where(CLOSE > 1.9, np.nan, CLOSE), "y is not finite: 1 of 6 values"),
        (np.where(CLOSE > 1.9, np.inf, CLOSE), "y is not finite: 1 of 6 values"),
        (CLOSE + 1e-12, "y differs from the reference by 1e-12, allowed are 2.84e-14; at"),
        (-CLOSE, r"at \(1, 2\): -2, expected 2"),
    ],
)
def test_what_is_not_close_is_found(actual, message):
    with pytest.raises(AssertionError, match=message):
        assertions.assert_close("y", actual, CLOSE, dtype="float64")


@pytest.mark.parametrize(
    ("actual", "options"),
    [
        (CLOSE, {}),
        (CLOSE * (1 + 2.0**-50), {}),
        (CLOSE + 1e-9, {"scale": 1e6}),
        (CLOSE + 1e-9, {"epsilons": 1e8}),
        ((CLOSE * (1 + 2.0**-20)).astype("float32"), {"dtype": "float32"}),
    ],
)
def test_what_is_close_is_accepted(actual, options):
    assertions.assert_close("y", actual, CLOSE, **{"dtype": "float64", **options})


def test_the_tolerance_is_small():
    off = CLOSE + 65 * np.finfo(float).eps * CLOSE.max()
    with pytest.raises(AssertionError, match="y differs"):
        assertions.assert_close("y", off, CLOSE, dtype="float64")


def test_nothing_is_close_to_zero_but_zero():
    with pytest.raises(AssertionError, match="allowed are 0"):
        assertions.assert_close("y", np.full(3, 1e-300), np.zeros(3), dtype="float64")


@pytest.mark.parametrize(
    ("actual", "message"),
    [
        (CLOSE.tolist(), "y must be a NumPy array, and is list"),
        (CLOSE.T, r"y must have shape \(2, 3\), and has \(3, 2\)"),
        (CLOSE.astype("float32"), "y must have dtype float64, and has float32"),
        (np.nextafter(CLOSE, 3), "y must be exactly equal, and differs in 6 of 6 values"),
        (np.where(CLOSE > 1.9, np.nan, CLOSE), "y must be exactly equal, and differs in 1 of 6 values"),
    ],
)
def test_what_is_not_the_same_is_found(actual, message):
    with pytest.raises(AssertionError, match=message):
        assertions.assert_same("y", actual, CLOSE)


def test_what_is_the_same_is_accepted():
    assertions.assert_same("y", CLOSE.copy(), CLOSE)


@pytest.mark.parametrize("actual", [{}, {"a": 1}, {"a": 1, "b": 2, "c": 3}, {"a": 1, "B": 2}])
def test_other_names_are_found(actual):
    with pytest.raises(AssertionError, match=r"they must have \['a', 'b'\], and has \["):
        assertions.assert_names("they", actual, {"b": 0, "a": 0})


def test_the_same_names_are_accepted_in_any_order():
    assertions.assert_names("they", {"a": 1, "b": 2}, {"b": 0, "a": 0})


def test_a_requirement_that_does_not_hold_is_found():
    with pytest.raises(AssertionError, match="it must hold"):
        assertions.require(bool(0), "it must hold")


def test_the_largest_value_is_that_of_all_arrays():
    assert assertions.largest(np.array([1.0, -3.0]), np.array([]), 2.0) == 3
    assert assertions.largest(np.array([])) == 0


def test_memory_that_is_held_for_a_moment_only_is_seen():
    megabytes = 64
    total, peak = memory.peak_resident(lambda: np.ones(megabytes << 17).sum())
    assert total == megabytes << 17
    assert peak >= 0.9 * (megabytes << 20)
