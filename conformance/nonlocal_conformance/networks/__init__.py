"""The networks that the drivers of this project put blocks into, one module each."""

__all__: list[str] = []
