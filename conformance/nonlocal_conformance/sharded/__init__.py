"""Blocks whose input is cut over several devices, one module for each framework."""

__all__: list[str] = []
