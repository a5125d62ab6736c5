"""The method "reassociated": the dot-product form by two small products instead of the matrix of weights."""

from __future__ import annotations

import torch
from torch import Tensor

from nonlocal_core.arguments import known_sizes
from nonlocal_core.planning import keys_first
from nonlocal_core.spec.form import Form
from nonlocal_torch.context import is_exported
from nonlocal_torch.methods.pairwise import count_keys
from nonlocal_torch.methods.products import multiply

__all__ = ["reassociated"]


def reassociated(theta: Tensor, phi: Tensor, g: Tensor, form: Form, key_mask: Tensor | None) -> Tensor:
    """Return theta (phi^T g) / M, by the cheaper order of the products; the array between them takes the factors.

    The sums over keys are at least float32.
    """
    wide = torch.promote_types(theta.dtype, torch.float32)
    factor = form.scale / count_keys(phi, key_mask)
    sizes = theta.shape[1], phi.shape[1]
    # In an export a comparison would bind the sizes.
    queries, keys = (None, None) if is_exported() else known_sizes(sizes)
    if keys_first(queries, keys, phi.shape[2], g.shape[2]):
        return multiply(theta, factor * multiply(phi.transpose(1, 2), g, wide), theta.dtype)
    return multiply(factor * multiply(theta, phi.transpose(1, 2), wide), g, theta.dtype)
