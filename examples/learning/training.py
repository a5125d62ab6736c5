"""The trainings: every network of a framework, with each of its seeds."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from learning.start import MIDDLES
from learning.task import digits, foursomes

__all__ = ["FOURS", "STEPS", "Trained", "train"]

Array = np.ndarray[Any, Any]

STEPS, FOURS = 250, 16


class Trained(NamedTuple):
    """The losses of a training, the scores of the answers after it, and the network, where it is asked for."""

    losses: list[float]
    scores: Array
    network: Any


def train(module: str, seeds: range, canvases: Array, *, keep: bool) -> dict[tuple[str, int], Trained]:
    """Train every network from every seed.

    Args:
        module: the file of the framework, by its name.
        seeds: what decides the weights at the start and the batches.
        canvases: those of the test.
        keep: whether to return the networks, which then must be picklable.

    Returns:
        What came of it, by what stands in the middle and the seed.
    """
    framework, (training, _) = import_module(f"learning.{module}"), digits()
    found = {}
    for middle, seed in ((middle, seed) for middle in MIDDLES for seed in seeds):
        learner, rng = framework.Learner(middle, seed), np.random.default_rng([seed, 1])
        losses = [learner.step(*foursomes(training, FOURS, rng)) for _ in range(STEPS)]
        found[middle, seed] = Trained(losses, learner.logits(canvases), learner.network if keep else None)
    return found
