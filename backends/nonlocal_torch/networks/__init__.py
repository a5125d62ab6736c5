"""Networks that hold non-local blocks: insertion, and what is asked of them."""

__all__: list[str] = []
