"""The non-local block for PyTorch; tensors are channels first, `(B, C, S1..Sk)`."""

import sys

try:
    import torch as _  # noqa: F401
except ImportError as error:
    message = "nonlocal_torch needs PyTorch. Install it with `pip install 'nonlocal-core[torch]'`."
    raise ImportError(message) from error

from nonlocal_torch.block import NonLocalBlock
from nonlocal_torch.networks import insert, look
from nonlocal_torch.networks.insert import insert_nonlocal, remove_nonlocal
from nonlocal_torch.networks.look import attention_of, check_identity
from nonlocal_torch.op import nonlocal_op

__all__ = ["NonLocalBlock", "attention_of", "check_identity", "insert_nonlocal", "nonlocal_op", "remove_nonlocal"]

# Where 0.1.0 had these modules, and pickled networks look for their functions.
sys.modules |= {f"{__name__}.insert": insert, f"{__name__}.network": look}
