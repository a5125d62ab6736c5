"""Faults that show only where two options meet are rejected by the checks of the output and of the gradients."""

import pytest
from mutations import SURVIVORS, fate, main, mutants

DRAWN = [pytest.param(one, id=f"{one[0]} {one[1]} {number}") for number, one in enumerate(mutants(200))]


@pytest.mark.parametrize("one", DRAWN)
def test_a_fault_where_two_options_meet_is_rejected_where_it_acts(one):
    assert fate(*one) != "survived"


def test_most_of_the_faults_act():
    assert sum(fate(*one) == "not reached" for one in mutants(40)) < 10


def test_what_is_equal_is_not_rejected():
    fates = {
        fate(step, change, {"form": "dot_product", "residual": False, "mask": False}) for step, change in SURVIVORS
    }
    assert fates == {"equal"}


def test_a_survivor_is_reported(monkeypatch, capsys):
    monkeypatch.setattr("mutations.SURVIVORS", {})
    monkeypatch.setattr(
        "mutations.mutants", lambda _: [("embed", "swapped", {"form": "dot_product", "residual": False})]
    )
    assert main() == 1
    assert "embed swapped where {'form': 'dot_product', 'residual': False}: survived" in capsys.readouterr().out
