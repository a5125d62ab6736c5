"""The methods that compute the operation, one module for each."""

__all__: list[str] = []
