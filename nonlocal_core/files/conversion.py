"""Arrays of any library as NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from nonlocal_core.errors import fail_type

__all__ = ["to_numpy"]

_DTYPES = ("float16", "float32", "float64", "bfloat16")


def to_numpy(label: str, value: Any) -> np.ndarray[Any, Any]:
    """Return a copy of an array of any library, in its own dtype; bfloat16, which NumPy lacks, becomes float32."""
    rule = f"be an array of {', '.join(_DTYPES)}"
    try:
        if hasattr(value, "detach"):  # PyTorch gives no array that requires gradients, or is elsewhere, or is bfloat16
            value = value.detach().cpu()
            value = value.float() if str(value.dtype).endswith("bfloat16") else value
        plain = np.asarray(value)
    except Exception:  # noqa: BLE001 - every library has its own error for an array that NumPy cannot read
        raise fail_type(label, rule, value) from None
    if plain.dtype.name not in _DTYPES:
        message = f"`{label}` must {rule}. Got dtype {plain.dtype}."
        raise TypeError(message)
    name = plain.dtype.name
    return np.array(plain, dtype="float32" if name == "bfloat16" else name, order="C")
