"""Faults made by rule: a step of the textbook goes wrong where two options meet. Run this file to see what survives."""

import random
import sys
from typing import NamedTuple

import numpy as np
import torch
from textbook import Textbook

import nonlocal_core as nlc
from nonlocal_conformance import CASES
from nonlocal_conformance.checks import derivatives, values

SEAMS = (
    *("project", "embed", "pool", "hide", "scores", "relu", "softmax", "divide", "weights", "combine", "aggregate"),
    *("gather", "flatten", "unflatten", "standardize", "norm", "residual"),
)
"""The steps of the textbook that give a tensor."""

CHANGES = {
    "doubled": lambda result, _: 2 * result,
    "dropped": lambda result, _: 0 * result,
    "shifted": lambda result, _: result.roll(1, -1),
    "swapped": lambda result, _: result.flip(0),
    "stale": lambda result, before: before if before is not None and before.shape == result.shape else result,
    "without gradient": lambda result, _: result.detach(),
}
"""What becomes of the result of a step; the second argument is the result before it."""

SURVIVORS = {
    ("embed", "swapped"): "theta and phi have their channels in another order, and products sum over these",
    ("pool", "shifted"): "without a mask keys and their values are in another order, and sums do not see it",
}
"""What may survive, and why."""

OPTIONS = {
    "rank": lambda call: call.x.ndim - 2,
    "form": lambda call: call.spec.pairwise,
    "sets": lambda call: (call.spec.axes, call.spec.group_size),
    "pooling": lambda call: call.spec.subsample and call.spec.subsample_at,
    "mask": lambda call: call.mask is not None,
    "norm": lambda call: (call.spec.norm, call.training),
    "scale": lambda call: call.spec.scale,
    "bias": lambda call: tuple(call.spec.bias.values()),
    "widths": lambda call: (call.spec.channels, call.spec.inner_channels),
    "residual": lambda call: call.spec.residual,
    "batch": lambda call: len(call.x),
}
"""The options of which two are to meet."""


class Call(NamedTuple):
    """A call of a block, as far as options are concerned."""

    spec: nlc.NonLocalSpec
    x: np.ndarray
    mask: np.ndarray | None
    training: bool


class Mutant(Textbook):
    """The textbook with one step that goes wrong where two options have these values."""

    def __init__(self, step, change, meeting):
        super().__init__()
        self.change, self.meeting, self.before, self.reached, self.active = CHANGES[change], meeting, None, False, False
        self.right = getattr(self, step)
        setattr(self, step, self.wrong)

    def check(self, spec, params, x, key_mask=None, training=False, method="auto"):
        """Note whether the options meet in this call."""
        super().check(spec, params, x, key_mask, training, method)
        self.active = meets(self.meeting, Call(spec, x, key_mask, training))

    def wrong(self, *args):
        """Return what the step gives, changed where the options meet."""
        result = self.right(*args)
        changed = self.change(result, self.before) if self.active else result
        self.reached = self.reached or (changed is not result and not _is_same(changed, result))
        self.before = result.detach()
        return changed


def _is_same(one, other):
    return one.requires_grad == other.requires_grad and torch.equal(one, other)


def meets(meeting, call):
    """Return whether the options of a call have the values that are to meet."""
    return all(OPTIONS[name](call) == value for name, value in meeting.items())


def calls():
    """Give each case of a named form with the arguments on which its options depend."""
    for case in CASES.values():
        if case.is_differentiable:
            data = case.data()
            yield case, Call(case.spec, data.x, data.key_mask, case.training)


def mutants(number, seed=0):
    """Return a number of steps, changes and meetings, each meeting one of some case."""
    rng, every = random.Random(seed), list(calls())  # noqa: S311 - it keeps no secret
    found = []
    for _ in range(number):
        _, call = rng.choice(every)
        names = rng.sample(sorted(OPTIONS), 2)
        meeting = {name: OPTIONS[name](call) for name in names}
        found.append((rng.choice(SEAMS), rng.choice(sorted(CHANGES)), meeting))
    return found


def fate(step, change, meeting):
    """Return the check and the case that reject a mutant, or "not reached", "equal" or "survived"."""
    mutant = Mutant(step, change, meeting)
    for case, call in calls():
        if not meets(meeting, call):
            continue
        for check in (values.forward, derivatives.gradients):
            try:
                with np.errstate(all="ignore"):
                    check(mutant, case, "float64")
            except Exception as error:  # noqa: BLE001 - whatever an implementation raises is its failure
                return f"{check.__name__} on {case.name}: {type(error).__name__}"
    if not mutant.reached:
        return "not reached"
    return "equal" if (step, change) in SURVIVORS else "survived"


def main():
    """Print the fate of each mutant; the exit status is 1 if one survives."""
    torch.set_num_threads(1)
    number = int(sys.argv[1]) if sys.argv[1:] and sys.argv[1].isdigit() else 600
    fates = [(one, fate(*one)) for one in mutants(number)]
    for (step, change, meeting), what in fates:
        sys.stdout.write(f"{step} {change} where {meeting}: {what}\n")
    counts = {name: sum(what == name for _, what in fates) for name in ("survived", "equal", "not reached")}
    sys.stdout.write(f"{number} mutants, of which {counts}\n")
    return min(counts["survived"], 1)


if __name__ == "__main__":
    sys.exit(main())
