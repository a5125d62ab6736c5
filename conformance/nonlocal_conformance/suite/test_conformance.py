"""The test that pytest runs once for each check, case and dtype of each backend."""

from collections.abc import Callable


def test_check(bound_check: Callable[[], None]) -> None:
    """Run one check."""
    bound_check()
