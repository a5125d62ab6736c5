"""The example that trains: its data need both ends of a canvas, and the frameworks learn alike."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[3] / "examples"
MODULES = ["in_torch", "in_tensorflow", "in_jax"]
MIDDLES = ["nothing", "convolution", "non-local block"]
STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def path():
    """Import the modules of the example as its script does."""
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def task():
    return importlib.import_module("learning.task")


@pytest.fixture(scope="module")
def fours(task):
    """Return canvases and labels, in fours."""
    return task.foursomes(task.digits()[1], 12, np.random.default_rng(3))


@pytest.fixture(scope="module")
def learned(task):
    """Return a function that gives a network after a few steps, and the losses of these."""
    found = {}

    def learn(module, middle):
        if (module, middle) not in found:
            learner, rng = (
                importlib.import_module(f"learning.{module}").Learner(middle, seed=5),
                np.random.default_rng(6),
            )
            batches = [task.foursomes(task.digits()[0], 3, rng) for _ in range(STEPS)]
            found[module, middle] = learner, [learner.step(*batch) for batch in batches]
        return found[module, middle]

    return learn


def test_no_image_is_in_both_parts(task):
    first, second = task.digits()
    images = np.concatenate([part.images.reshape(-1, task.SIDE**2) for part in (first, second)])
    assert len(np.unique(images, axis=0)) == len(images)
    assert set(first.classes) == set(second.classes) == set(range(task.CLASSES))


@pytest.mark.parametrize("end", [np.s_[:, :, :10], np.s_[:, :, -10:]], ids=["left", "right"])
def test_every_end_is_as_often_in_an_equal_pair_as_in_an_unequal_one(fours, end):
    canvases, labels = fours
    _, which = np.unique(canvases[end].reshape(len(canvases), -1), axis=0, return_inverse=True)
    which = which.ravel()  # which NumPy 2.0 gives an axis more
    same = np.bincount(which, weights=labels[:, 0])
    np.testing.assert_array_equal(same * 2, np.bincount(which))


def test_the_label_says_whether_one_digit_is_there_or_two(fours):
    _, labels = fours
    np.testing.assert_array_equal(labels[:, 1:].sum(axis=1), 2 - labels[:, 0])


def test_nothing_is_drawn_between_the_ends(fours):
    assert not fours[0][:, :, 10:-10].any()
    assert fours[0][:, :, :10].any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("middle", MIDDLES)
def test_only_the_block_joins_both_ends(learned, fours, module, middle):
    scores = learned(module, middle)[0].logits(fours[0])[:, 0].reshape(-1, 4)
    joined = np.abs(scores @ [1, 1, -1, -1]) / np.abs(scores).max()
    if middle == "non-local block":
        assert np.median(joined) > 1e-4
    else:
        assert joined.max() < 32 * np.finfo(np.float32).eps


@pytest.mark.parametrize("module", MODULES)
def test_the_networks_of_a_seed_begin_as_one_function(learned, module):
    first = [learned(module, middle)[1][0] for middle in MIDDLES]
    np.testing.assert_allclose(first, first[0], rtol=1e-6)


@pytest.mark.parametrize("module", MODULES[1:])
@pytest.mark.parametrize("middle", MIDDLES)
def test_the_frameworks_learn_alike(learned, module, middle):
    np.testing.assert_allclose(learned(module, middle)[1], learned("in_torch", middle)[1], rtol=2e-6)
