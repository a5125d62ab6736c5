"""Faulty implementations: each is the textbook's driver with one step replaced, and names the checks that find it."""

import dataclasses
from collections.abc import Callable

from textbook import Textbook

from nonlocal_conformance import CHECKS
from nonlocal_conformance.capabilities import CAPABILITIES

FAULTS = {}


@dataclasses.dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        name: a sentence, with "_" between its words.
        step: the one method of the textbook that is replaced.
        replacement: what replaces it.
        checks: the names of the checks each of which must reject it.
        raises: how they reject it: by an assertion, or by an error that it runs into.
    """

    name: str
    step: str
    replacement: Callable
    checks: tuple[str, ...]
    raises: type[Exception] | tuple[type[Exception], ...] = AssertionError

    @property
    def description(self):
        """What is wrong."""
        return self.replacement.__doc__

    def driver(self):
        """Return the faulty driver."""
        # The textbook is too slow for one capability and too wasteful for another; what replaces a step need not be.
        own = {"name": self.name, "capabilities": frozenset(CAPABILITIES), self.step: self.replacement}
        return type("Faulty", (Textbook,), own)()


def fault(step, *checks, raises=AssertionError):
    """Register a function that replaces a step of the textbook; its name and its docstring say what is wrong."""

    def register(replacement):
        name = replacement.__name__
        unknown = [check for check in checks if check not in CHECKS]
        if unknown or not checks or not hasattr(Textbook, step) or name in FAULTS:
            message = f"the fault {name!r} must have a new name, a step and checks. Got {step!r} and {checks}."
            raise ValueError(message)
        FAULTS[name] = Fault(name, step, replacement, checks, raises)
        return replacement

    return register
