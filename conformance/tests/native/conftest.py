"""What several tests of one framework share."""

import sys
from pathlib import Path

import pytest

# The modules here are no package: those that the tests share are found by their bare names.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module")
def _compile_fast():
    """Spare XLA most of its optimisations: every program of these modules runs once or twice."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)  # noqa: FBT003 - it has no other form
    yield
    jax.config.update("jax_disable_most_optimizations", False)  # noqa: FBT003
