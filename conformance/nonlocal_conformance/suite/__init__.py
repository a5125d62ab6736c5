"""What `nonlocal conformance` collects."""
