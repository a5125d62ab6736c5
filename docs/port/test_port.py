"""The tests of the implementation, of which the conformance suite is one."""

from driver import Driver

from nonlocal_conformance import parametrize_with_checks


@parametrize_with_checks(Driver())
def test_my_block(check):
    check()
