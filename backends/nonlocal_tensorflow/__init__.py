"""The non-local block for Keras 3 on TensorFlow; tensors are channels last, `(B, S1..Sk, C)`."""

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
from nonlocal_tensorflow.insert import insert_nonlocal, remove_nonlocal
from nonlocal_tensorflow.network import attention_of, check_identity
from nonlocal_tensorflow.op import nonlocal_op

__all__ = ["NonLocalBlock", "attention_of", "check_identity", "insert_nonlocal", "nonlocal_op", "remove_nonlocal"]
