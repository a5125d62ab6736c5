"""What a non-local block computes: its options, its parameters and its presets."""

from nonlocal_core.spec.block import SPECIFICATION_VERSION, NonLocalSpec

__all__ = ["SPECIFICATION_VERSION", "NonLocalSpec"]
