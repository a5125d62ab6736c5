def test_the_backend_passes_the_check(bound_check):
    bound_check()
