"""Networks that hold non-local blocks."""
