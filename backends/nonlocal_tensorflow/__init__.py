"""The non-local block for Keras 3 on TensorFlow; tensors are channels last, `(B, S1..Sk, C)`."""

import sys

try:
    import tensorflow as tf  # noqa: F401
    from keras import config
except ImportError as error:
    message = (
        "nonlocal_tensorflow needs TensorFlow, and Keras 3 on its TensorFlow backend (KERAS_BACKEND=tensorflow). "
        "Install them with `pip install 'nonlocal-core[tensorflow]'`."
    )
    raise ImportError(message) from error

if config.backend() != "tensorflow":
    message = (
        "nonlocal_tensorflow needs Keras on its TensorFlow backend. Set the environment variable "
        f"KERAS_BACKEND=tensorflow before Keras is imported. Got KERAS_BACKEND={config.backend()}."
    )
    raise ImportError(message)

from nonlocal_tensorflow.block import NonLocalBlock
from nonlocal_tensorflow.networks import insert, look
from nonlocal_tensorflow.networks.insert import insert_nonlocal, remove_nonlocal
from nonlocal_tensorflow.networks.look import attention_of, check_identity
from nonlocal_tensorflow.op import nonlocal_op

__all__ = ["NonLocalBlock", "attention_of", "check_identity", "insert_nonlocal", "nonlocal_op", "remove_nonlocal"]

# Where 0.1.0 had these modules, and its pickles look for functions and classes.
for _name, _module in {"insert": insert, "network": look}.items():
    sys.modules[f"{__name__}.{_name}"] = _module
