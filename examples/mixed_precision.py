"""Mixed precision
===============

Half precision makes products fast and takes half the memory, and a non-local block is where networks most easily leave
its range: a score is a sum over channels that nothing bounds. This guide shows what a block computes in which dtype,
how to ask for it in each framework, how large the errors are against the reference in float64, and that a score beyond
the largest float16, 65504, does no harm.
"""

import jax.numpy as jnp
import keras
import matplotlib.pyplot as plt
import numpy as np
import torch
from flax import nnx

import nonlocal_core as nlc
import nonlocal_jax
import nonlocal_tensorflow
import nonlocal_torch

# %%
# What is computed in which dtype
# -------------------------------
#
# Narrow are the operands: the input of each product, the weights of the layers, theta, phi, g, and y where it enters
# the last layer. Scores, weights and the sums over keys leave their product in float32, so they neither overflow nor
# lose the digits of a long sum. Parameters stay what they are, float32 as a rule; batch normalisation and the running
# statistics are at least float32. The output has the dtype of the input, and the sum with the input is made in it: a
# new block is the identity in half precision too, bit for bit.
#
# Each framework has its own way to ask for it. In PyTorch it is autocast:


def in_torch(x, params, spec, dtype):
    """Return the output of the block under autocast."""
    block = nonlocal_torch.NonLocalBlock.from_spec(spec).eval()
    block.import_params(params)
    with torch.no_grad(), torch.autocast("cpu", getattr(torch, dtype), enabled=dtype != "float32"):
        return block(torch.from_numpy(x).movedim(-1, 1)).movedim(1, -1).float().numpy()


# %%
# In Keras it is the policy. Keras itself casts what enters a layer to the narrow dtype, and with it the output;
# ``autocast=False`` leaves the input as it is, as in the other two frameworks.


def in_keras(x, params, spec, dtype):
    """Return the output of the layer with a policy of mixed precision."""
    policy = dtype if dtype == "float32" else f"mixed_{dtype}"
    block = nonlocal_tensorflow.NonLocalBlock.from_spec(spec, dtype=policy, autocast=False)
    block.import_params(params)
    return np.array(block(keras.ops.convert_to_tensor(x)))


# %%
# In Flax it is ``dtype=`` of the module; the pure function has the same argument.


def in_jax(x, params, spec, dtype):
    """Return the output of the module with operands in a dtype."""
    block = nonlocal_jax.NonLocalBlock.from_spec(spec, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype))
    block.import_params(params)
    block.eval()
    return np.array(block(x))


FRAMEWORKS = {"PyTorch": in_torch, "Keras": in_keras, "JAX": in_jax}
DTYPES = ("float32", "float16", "bfloat16")

# %%
# How large the errors are
# ------------------------
#
# The reference computes in float64, from the same float32 parameters and input. The error is the largest difference,
# relative to the largest value of what the block adds. Float16 has 11 binary digits, bfloat16 has 8 and the range of
# float32.

FORMS = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")


def example(form, rng):
    """Return an input, parameters and the spec of a block that adds something."""
    spec = nlc.NonLocalSpec(channels=32, pairwise=form, subsample=2, residual=False, scale="inner")
    shapes = nlc.param_shapes(spec)
    params = {name: rng.normal(scale=shape[-1] ** -0.5 if shape else 1.0, size=shape) for name, shape in shapes.items()}
    x = rng.normal(size=(2, 14, 18, 32)).astype(np.float32)
    return x, {name: array.astype(np.float32) for name, array in params.items()}, spec


def wide(params):
    """Return parameters in float64."""
    return {name: array.astype(np.float64) for name, array in params.items()}


errors = {}
for form in FORMS:
    x, params, spec = example(form, np.random.default_rng(0))
    expected = nlc.nonlocal_block(x.astype(np.float64), wide(params), spec)
    for framework, run in FRAMEWORKS.items():
        for dtype in DTYPES:
            error = np.abs(run(x, params, spec, dtype) - expected).max() / np.abs(expected).max()
            errors[form, framework, dtype] = error

print(f"{'':18}{'':9}" + "".join(f"{dtype:>10}" for dtype in DTYPES))
for form in FORMS:
    for framework in FRAMEWORKS:
        print(f"{form:18}{framework:9}" + "".join(f"{errors[form, framework, dtype]:10.1e}" for dtype in DTYPES))

# %%
# The three frameworks agree: the errors are those of the dtype, a few units of its rounding, marked by the lines.

UNITS = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
figure.suptitle("Largest error of a block against the reference in float64")
colours = {"float32": "tab:green", "float16": "tab:blue", "bfloat16": "tab:orange"}
markers = {"PyTorch": "o", "Keras": "s", "JAX": "^"}
for dtype, unit in UNITS.items():
    axis.axhline(unit, color=colours[dtype], linewidth=0.8, linestyle="--")
    for offset, (framework, marker) in enumerate(markers.items(), -1):
        heights = [errors[form, framework, dtype] for form in FORMS]
        places = np.arange(len(FORMS)) + 0.15 * offset
        axis.plot(places, heights, marker, color=colours[dtype], label=f"{dtype}, {framework}")
axis.set(
    yscale="log", ylabel="relative error", xticks=range(len(FORMS)), xticklabels=[f.replace("_", " ") for f in FORMS]
)
axis.legend(ncols=1, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize="small")
plt.show()

# %%
# A score beyond 65504
# --------------------
#
# With 512 channels of moderate size, an inner product of two positions exceeds the largest float16. A product that
# gives float16 makes infinity of it, and the softmax makes NaN of that:

rng = np.random.default_rng(0)
x = (24 * rng.normal(size=(1, 6, 7, 512))).astype(np.float32)
flat = x[0].reshape(-1, 512)
scores = flat @ flat.T
with np.errstate(over="ignore", invalid="ignore"):
    narrow = scores.astype(np.float16)
    naive = np.exp(narrow - narrow.max(axis=1, keepdims=True))
print(f"largest score {scores.max():,.0f}, in float16 {narrow.max()}, then {np.isnan(naive).mean():.0%} of weights NaN")

# %%
# The block keeps the score in float32 and applies the scale to theta first, so the result is finite and right:

spec = nlc.NonLocalSpec(channels=512, inner_channels=512, pairwise="gaussian", scale=1e-4, bias=False, residual=False)
params = {name: np.eye(512, dtype=np.float32) for name in nlc.param_shapes(spec)}
expected = nlc.nonlocal_block(x.astype(np.float64), wide(params), spec)
for framework, run in FRAMEWORKS.items():
    z = run(x, params, spec, "float16")
    error = np.abs(z - expected).max() / np.abs(expected).max()
    print(f"{framework:8} finite: {np.isfinite(z).all()}, relative error {error:.1e}")
    assert error < 64 * UNITS["float16"]

# %%
# In training, float16 still needs the scaling of the loss that each framework offers, for gradients become too small
# for it; bfloat16 needs none. The suite checks all of this on every backend: ``nonlocal conformance torch`` runs, among
# others, ``mixed_precision``, ``large_scores``, ``long_sums`` and ``mixed_identity``.
