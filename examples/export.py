r"""Export
======

A trained block leaves PyTorch as an exported program or as ONNX, Keras as a SavedModel, and JAX as a serialised
function. Each serves all sizes from a smallest one on, which comes from the pooling of the keys and is given at its
place, and is compared here with the block that it came from, at a size that the export has not seen.
"""

import logging
import tempfile
import warnings
from pathlib import Path

import jax
import keras
import numpy as np
import onnxruntime
import tensorflow as tf
import torch

import nonlocal_core as nlc
import nonlocal_jax
import nonlocal_tensorflow
import nonlocal_torch

folder = Path(tempfile.mkdtemp())
rng = np.random.default_rng(0)

# %%
# A trained block
# ---------------
#
# The parameters stand for trained ones: they are random, and every one of them matters. All frameworks get the same.

spec = nlc.NonLocalSpec(channels=32, subsample=2, norm="batch")
params = {name: np.abs(rng.normal(0.3, 0.1, shape)) for name, shape in nlc.param_shapes(spec).items()}
x = rng.normal(size=(3, 15, 22, 32)).astype(np.float32)
reference = nlc.nonlocal_block(x, params, spec)


def difference(z):
    """Return the largest difference from the reference, for channels last."""
    return f"{np.abs(np.asarray(z) - reference).max():.1e} of {np.abs(reference).max():.1f}"


# %%
# Fold the norm first
# -------------------
#
# In evaluation batch normalisation is a factor and a shift for each channel, and the layer before it can take both.
# ``fold_norm`` gives the block without norm that computes the same.

block = nonlocal_torch.NonLocalBlock.from_spec(spec).eval()
block.import_params(params)
folded = block.fold_norm()
given = torch.from_numpy(x).movedim(-1, 1)
with torch.no_grad():
    print("before:", difference(block(given).movedim(1, -1)))
    print("folded:", difference(folded(given).movedim(1, -1)))

# %%
# A block inside a network is replaced by assignment: ``model.layer3[4].nonlocal_block = block.fold_norm()``.

# %%
# PyTorch: torch.export
# ---------------------
#
# The sizes are named, and the program then serves all from the smallest that is stated: to PyTorch an axis of size 1 is
# a case of its own, in the grid of pooled keys too. With pooling by 2 these are images from 4 x 4 on.

batch, height, width = (
    torch.export.Dim("batch", min=2),
    torch.export.Dim("height", min=4),
    torch.export.Dim("width", min=4),
)
sizes = {"x": {0: batch, 2: height, 3: width}}
example = (torch.randn(2, 32, 8, 10),)
program = torch.export.export(folded, example, dynamic_shapes=sizes)
torch.export.save(program, folder / "block.pt2")
loaded = torch.export.load(folder / "block.pt2").module()
with torch.no_grad():
    print(difference(loaded(given).movedim(1, -1)))

# %%
# PyTorch: ONNX
# -------------
#
# The same sizes, and ONNX Runtime with the optimisations that it has by default.

warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)  # PyTorch's own
onnx_program = torch.onnx.export(folded, example, dynamo=True, dynamic_shapes=sizes, verbose=False)
onnx_program.save(folder / "block.onnx")
session = onnxruntime.InferenceSession(folder / "block.onnx")
(z,) = session.run(None, {"x": given.numpy()})
print(difference(np.moveaxis(z, 1, -1)))

# %%
# Keras: SavedModel
# -----------------
#
# Sizes of None are open, down to one window of the pooling. What is loaded computes and has no gradients: the own ones
# of the block are not saved, of which TensorFlow warns.

keras_block = nonlocal_tensorflow.NonLocalBlock.from_spec(spec)
keras_block.import_params(params)
inputs = keras.Input((None, None, 32))
model = keras.Model(inputs, keras_block.fold_norm()(inputs))
model.export(folder / "saved_model", verbose=False)
logging.getLogger("absl").setLevel(logging.ERROR)
loaded = tf.saved_model.load(folder / "saved_model")  # the name keeps its variables alive
print(difference(loaded.serve(x)))

# %%
# JAX: jax.export
# ---------------
#
# From the pure function, for images from 2 x 2 on; a Flax module is exported by way of ``nnx.split``.

folded_params, folded_spec = nlc.fold_norm(params, spec)
narrow = {name: jax.numpy.asarray(array, "float32") for name, array in folded_params.items()}
batch, height, width = jax.export.symbolic_shape("batch, height, width", constraints=["height >= 2", "width >= 2"])
call = jax.jit(lambda x: nonlocal_jax.nonlocal_block(x, narrow, folded_spec))
exported = jax.export.export(call)(jax.ShapeDtypeStruct((batch, height, width, 32), "float32"))
loaded = jax.export.deserialize(exported.serialize())
print(difference(loaded.call(x)))
