"""The non-local block for JAX, as pure functions and as a Flax module; arrays are channels last, `(B, S1..Sk, C)`."""

import sys

try:
    import flax as _flax  # noqa: F401
    import jax as _jax  # noqa: F401
except ImportError as error:
    message = "nonlocal_jax needs JAX and Flax. Install them with `pip install 'nonlocal-core[jax]'`."
    raise ImportError(message) from error

from nonlocal_jax.block import NonLocalBlock
from nonlocal_jax.function import attention, nonlocal_block, updated_statistics
from nonlocal_jax.networks import insert, look
from nonlocal_jax.networks.insert import insert_nonlocal, remove_nonlocal
from nonlocal_jax.networks.look import attention_of, check_identity
from nonlocal_jax.op import nonlocal_op

__all__ = [
    "NonLocalBlock",
    "attention",
    "attention_of",
    "check_identity",
    "insert_nonlocal",
    "nonlocal_block",
    "nonlocal_op",
    "remove_nonlocal",
    "updated_statistics",
]

# Where 0.1.0 had these modules, and its pickles look for their functions.
sys.modules |= {f"{__name__}.insert": insert, f"{__name__}.network": look}
