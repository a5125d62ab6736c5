"""The third party's own tests, of which the conformance suite is one."""

from toy_nonlocal.driver import ToyDriver

from nonlocal_conformance import parametrize_with_checks


@parametrize_with_checks(ToyDriver())
def test_the_block_is_what_it_says(check):
    check()
