r"""Port a checkpoint
=================

Networks with non-local blocks were trained in half a dozen implementations, and each calls the parameters otherwise,
pools at another place or scales the scores in its own way. This guide takes a block out of such a file, into PyTorch,
Keras and JAX, and proves that the numbers are those of the original.

The original here is a block with the names and the order of operations of SlowFast, with random weights, written down
in a few lines so that nothing has to be downloaded.
"""

import tempfile
import warnings
from pathlib import Path

import keras
import matplotlib.pyplot as plt
import numpy as np
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file
from torch import nn

import nonlocal_core as nlc
import nonlocal_jax
import nonlocal_tensorflow
import nonlocal_torch


class Original(nn.Module):
    """Dot product; the input is pooled before phi and g."""

    def __init__(self, channels, inner):
        super().__init__()
        for layer in ("theta", "phi", "g"):
            self.add_module(f"conv_{layer}", nn.Conv3d(channels, inner, 1))
        self.conv_out = nn.Conv3d(inner, channels, 1)
        self.bn = nn.BatchNorm3d(channels)
        self.pool = nn.MaxPool3d((1, 2, 2))

    def forward(self, x):
        keys = self.pool(x)
        theta, phi, g = (a.flatten(2) for a in (self.conv_theta(x), self.conv_phi(keys), self.conv_g(keys)))
        y = g @ (theta.mT @ phi).mT / phi.shape[2]
        return x + self.bn(self.conv_out(y.unflatten(2, x.shape[2:])))


torch.manual_seed(0)
original = nn.ModuleDict({"s3": nn.ModuleDict({"pathway0_nonlocal1": Original(16, 8)})}).double().eval()
for name, value in original.state_dict().items():
    if value.is_floating_point():
        value.copy_(torch.rand_like(value) + 0.5 if name.endswith("var") else torch.randn_like(value))

scratch = tempfile.TemporaryDirectory()
folder = Path(scratch.name)
torch.save({"epoch": 196, "model_state": original.state_dict()}, folder / "net.pth")

# %%
# Open the file
# -------------
#
# A ``.pth`` file is a pickle, and a pickle can run any program. ``weights_only=True`` admits tensors and plain values
# alone. This library takes the mapping of names to arrays, and never opens a pickle by itself.

state_dict = torch.load(folder / "net.pth", weights_only=True)["model_state"]
print(*state_dict, sep="\n")

# %%
# Find the blocks
# ---------------
#
# The keys tell where blocks are, and whose.

found = nlc.find_peer_blocks(state_dict)
print(found)

# %%
# Read one
# --------
#
# Shapes and keys tell C and C', the norm, the biases, and whether there is a theta. They do not tell the rest; what is
# taken from the preset of the implementation is named in a warning.

(prefix, peer), *_ = found
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    params, spec = nlc.from_peer(state_dict, peer=peer, prefix=prefix)
print(caught[0].message)

# %%
# The configuration that trained the network has the answers. Here it is a dot product, the default of SlowFast's
# configuration files, while that of its class is the softmax. Options that are given are not warned of.

known = {
    "scale": None,
    "subsample": (1, 2, 2),
    "subsample_at": "input",
    "group_size": None,
    "norm_epsilon": 1e-5,
}
params, spec = nlc.from_peer(state_dict, peer=peer, prefix=prefix, pairwise="dot_product", **known)
print({name: array.shape for name, array in params.items()})

# %%
# Prove it
# --------
#
# One input goes through the original and through the block in each framework. The original computes in float64, and so
# does the reference; the adapters compute in float32.

x = np.random.default_rng(0).normal(size=(1, 3, 7, 5, 16))
with torch.no_grad():
    expected = original["s3"]["pathway0_nonlocal1"](torch.from_numpy(x).movedim(-1, 1)).movedim(1, -1).numpy()


def difference(z):
    """Return the largest difference from the original, relative to its largest value."""
    return np.abs(np.asarray(z) - expected).max() / np.abs(expected).max()


single = x.astype(np.float32)
in_torch = nonlocal_torch.NonLocalBlock.from_spec(spec).eval()
in_keras = nonlocal_tensorflow.NonLocalBlock.from_spec(spec)
in_jax = nonlocal_jax.NonLocalBlock.from_spec(spec, rngs=nnx.Rngs(0))
in_keras.build(x.shape)
in_jax.eval()
for block in (in_torch, in_keras, in_jax):
    block.import_params(params)
with torch.no_grad():
    z_torch = in_torch(torch.from_numpy(single).movedim(-1, 1)).movedim(1, -1)
print(f"reference, float64: {difference(nlc.nonlocal_block(x, params, spec)):.1e}")
print(f"PyTorch, float32:   {difference(z_torch):.1e}")
print(f"Keras, float32:     {difference(keras.ops.convert_to_numpy(in_keras(single))):.1e}")
print(f"JAX, float32:       {difference(in_jax(single)):.1e}")

# %%
# What a wrong guess costs
# ------------------------
#
# A wrong option raises no error: all shapes fit. It gives other numbers, and the network is worse than it should be for
# no visible reason. So compare outputs, not shapes.

guesses = {
    "all right": {},
    "pooled after\nthe projection": {"subsample_at": "projection"},
    "not pooled": {"subsample": None},
    "softmax": {"pairwise": "embedded_gaussian"},
    "epsilon of\nKeras, 1e-3": {"norm_epsilon": 1e-3},
}
errors = {
    guess: difference(nlc.nonlocal_block(x, params, spec.replace(**changes))) for guess, changes in guesses.items()
}
figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
axes.barh(list(errors), list(errors.values()), color=["tab:green", *["tab:red"] * 4])
axes.set(xscale="log", xlim=(1e-17, 1e3), xlabel="largest difference from the original, relative to its largest value")
axes.invert_yaxis()
for row, error in enumerate(errors.values()):
    axes.text(error * 1.3, row, f"{error:.1g}", va="center")
figure.suptitle("One block, one file, five readings of it")
plt.show()

# %%
# And back
# --------
#
# A block that was trained here goes into the original under its own keys. An option that the original's code does not
# have is refused by name, because it would give other numbers there.

written = nlc.to_peer(in_torch.export_params(), spec, peer="slowfast", prefix=prefix)
original.load_state_dict({name: torch.from_numpy(array) for name, array in written.items()}, strict=True)
try:
    nlc.to_peer(params, spec.replace(subsample_at="projection"), peer="slowfast")
except ValueError as error:
    print(error)

# %%
# Other files
# -----------
#
# *safetensors* cannot hold anything but arrays:

save_file(written, folder / "net.safetensors")
print(nlc.find_peer_blocks(load_file(folder / "net.safetensors")))

# %%
# *Caffe2's pickles*, such as those of the official implementation, hold NumPy arrays. ``nlc.read_caffe2`` makes arrays
# from their bytes, executes nothing, and refuses a file that asks for anything else:

(folder / "hostile.pkl").write_bytes(b"cos\nsystem\n(S'echo you have been had'\ntR.")
try:
    nlc.read_caffe2(folder / "hostile.pkl")
except ValueError as error:
    print(str(error).partition(": ")[2])

# %%
# A real one is read by ``nlc.from_peer(nlc.read_caffe2(path), peer="official", prefix="nonlocal_conv3_1")``. The nets
# for long clips have no norm in their blocks; ``peer="official_affine"`` gives those of res3 groups of four frames.
#
# *Keras* files have no fixed names for the layers of a block, so the four kernels are named by hand:

layers = {
    name: keras.layers.Conv2D(filters, 1, use_bias=False)
    for name, filters in (("theta", 8), ("phi", 8), ("g", 8), ("out", 16))
}
for name, layer in layers.items():
    layer.build((None, None, None, 8 if name == "out" else 16))
kernels = {name: layer.kernel for name, layer in layers.items()}
known = {"pairwise": "dot_product", "scale": None, "subsample": None}
params, spec = nlc.from_peer(kernels, peer="keras_nonlocal", **known)
print({name: array.shape for name, array in params.items()})

scratch.cleanup()
