r"""Layers of Keras: LoRA, eight bits, TensorFlow Lite
==================================================

The projections of a block, ``theta``, ``phi``, ``g`` and ``out``, are layers of Keras. What is hung on them acts, in a
call and in ``attention`` alike, and a layer in the place of one of them is called as it is.
"""

import keras
import numpy as np
import tensorflow as tf

from nonlocal_tensorflow import NonLocalBlock

keras.utils.set_random_seed(0)
block = NonLocalBlock(16, subsample=2, zero_init=False)
model = keras.Sequential([keras.Input((None, None, 16)), block])
images = np.random.default_rng(0).normal(size=(4, 8, 6, 16)).astype("float32")
expected = model(images)

# %%
# LoRA
# ----
#
# ``enable_lora`` freezes a kernel and trains two small matrices beside it. ``export_params`` gives their sum.

for layer in (block.theta, block.phi, block.g, block.out):
    layer.enable_lora(2)
    layer.bias.trainable = False
print([weight.path.split("/", 1)[1] for weight in block.trainable_weights])
model.compile("adam", "mse")
model.fit(images, images.mean(axis=(1, 2), keepdims=True) + images, epochs=5, verbose=0)
print(block.export_params()["theta.weight"].shape)

# %%
# A learned bias for each pair of positions
# -----------------------------------------
#
# ``pairwise`` may be a layer, which gives the scores. It trains and is saved with the block.


@keras.saving.register_keras_serializable()
class Scores(keras.Layer):
    """The dot product, and a bias for each query and key."""

    def build(self, theta_shape, phi_shape):
        """Create the bias: the number of positions must be known."""
        self.bias = self.add_weight(shape=(theta_shape[1], phi_shape[1]), initializer="zeros", name="bias")

    def call(self, theta, phi):
        """Return `(B, N, M)`."""
        return keras.ops.matmul(theta, keras.ops.swapaxes(phi, 1, 2)) + self.bias


biased = NonLocalBlock(16, pairwise=Scores(), normalize="softmax", subsample=2)
keras.Sequential([keras.Input((8, 6, 16)), biased])
print(biased.pairwise.bias.shape)

# %%
# Initialisers, regularisers and constraints
# ------------------------------------------
#
# The arguments of ``keras.layers.Dense`` for its kernel and its bias are those of a block too, for all its projections.
# With ``zero_init`` the block starts as the identity in any case. One layer alone is given as a layer of your own.

held = NonLocalBlock(16, kernel_initializer="glorot_uniform", kernel_regularizer="l2", kernel_constraint="max_norm")
held.g = keras.layers.Dense(8, kernel_regularizer="l1")
print(len(held.losses), type(held.phi.kernel.constraint).__name__, held.g.kernel.constraint)

# %%
# Eight bits
# ----------
#
# ``quantize`` of a block is that of its projections, and ``quantize`` of a whole model reaches them too.

small = NonLocalBlock.from_spec(block.spec)
small.import_params(block.export_params())
network = keras.Sequential([keras.Input((None, None, 16)), small])
exact = network(images)
small.quantize("int8")
print(f"{np.abs(network(images) - exact).max():.1e} of {np.abs(exact).max():.1f}")

# %%
# TensorFlow Lite
# ---------------
#
# Every form is converted, with any batch and any size. ``from_concrete_functions`` takes a function with a block too,
# without a second argument: a Keras layer or model given there, a ``Dense`` as well, is converted without its weights.

converted = tf.lite.TFLiteConverter.from_keras_model(model).convert()
interpreter = tf.lite.Interpreter(model_content=converted)
place = interpreter.get_input_details()[0]["index"]
interpreter.resize_tensor_input(place, images.shape)
interpreter.allocate_tensors()
interpreter.set_tensor(place, images)
interpreter.invoke()
found = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
print(f"{np.abs(found - model(images)).max():.1e} of {np.abs(found).max():.1f}")
