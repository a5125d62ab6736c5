"""Every fault is rejected by the checks that it names, and what has no fault passes every check."""

from functools import partial

import numpy as np
import pytest
from faults import FAULTS, line, main, pairs, rejection
from faulty import Fault, fault
from hypothesis import given
from textbook import Textbook

import nonlocal_core as nlc
from nonlocal_conformance import CHECKS, parametrize_with_checks
from nonlocal_conformance.strategies import cases

PAIRS = [pytest.param(one, check, id=f"{one.name} by {check}") for one, check in pairs()]


@parametrize_with_checks(Textbook())
def test_the_textbook_passes_every_check(check):
    check()


@given(case=cases())
def test_the_textbook_and_the_reference_agree_on_a_random_block(case):
    data, training = case.data(), case.training
    z, _ = Textbook().block(case.spec, data.params, data.x, data.key_mask, training=training)
    dx, dparams = Textbook().vjp(case.spec, data.params, data.x, data.dz, data.key_mask, training=training)
    expected = nlc.nonlocal_block(data.x, data.params, case.spec, data.key_mask, training)
    gradients = nlc.nonlocal_block_vjp(data.x, data.params, case.spec, data.dz, data.key_mask, training)
    # Random data may cancel, so this compares what is computed, not its last digits.
    close = partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-8)
    close(z, expected)
    close(dx, gradients[0])
    assert dparams.keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        close(dparams[name], gradient)


@pytest.mark.parametrize(("one", "check"), PAIRS)
def test_a_fault_is_rejected(one, check, record_rejection):
    message = rejection(one, check)
    assert message is not None, f"{check} accepts a driver of which this is wrong: {one.description}"
    record_rejection(line(one, check, message))


@pytest.mark.parametrize("one", [pytest.param(one, id=one.name) for one in FAULTS.values()])
def test_a_fault_replaces_one_step_of_the_textbook_and_says_how(one):
    replaced = {name for name in vars(type(one.driver())) if not name.startswith("__")}
    assert replaced == {"name", "capabilities", one.step}
    assert one.description.endswith(".")


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_has_a_fault_to_reject(check):
    assert any(check in one.checks for one in FAULTS.values())


def test_a_driver_without_a_fault_is_not_rejected():
    sound = Fault("nothing_is_wrong", "relu", Textbook.relu, ("operation_gradients",))
    assert rejection(sound, "operation_gradients") is None


def test_a_fault_that_runs_into_another_error_than_it_says_is_no_rejection():
    broken = Fault("a_slip_of_the_pen", "relu", lambda self, a: self.rleu(a), ("operation_gradients",))
    with pytest.raises(AttributeError, match="rleu"):
        rejection(broken, "operation_gradients")


@pytest.mark.parametrize(
    ("step", "checks"),
    [("relu", ()), ("relu", ("fast_forward",)), ("rleu", ("forward",))],
    ids=["no check", "unknown check", "unknown step"],
)
def test_a_fault_must_name_a_step_and_checks_that_exist(step, checks):
    with pytest.raises(ValueError, match="must have a new name, a step and checks"):
        fault(step, *checks)(Textbook.relu)


def test_two_faults_cannot_have_one_name():
    known = next(iter(FAULTS.values()))
    with pytest.raises(ValueError, match=known.name):
        fault(known.step, *known.checks)(known.replacement)


@pytest.mark.parametrize(
    ("name", "status", "last"),
    [
        ("the_relu_is_missing", 0, "1 faults, 2 rejections, 0 faults not rejected"),
        ("nothing_is_wrong", 1, "1 faults, 1 rejections, 1 faults not rejected"),
    ],
)
def test_the_table_ends_with_what_was_rejected(name, status, last, monkeypatch, capsys):
    sound = Fault("nothing_is_wrong", "relu", Textbook.relu, ("operation_gradients",))
    kept = {**FAULTS, sound.name: sound}[name]
    monkeypatch.setattr("faults.FAULTS", {name: kept})
    assert main() == status
    *_, said = capsys.readouterr().out.splitlines()
    assert said == last
