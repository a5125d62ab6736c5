"""Larger inputs than memory allowed
=================================

The weights of all pairs of N positions are an N x N matrix, and users of non-local blocks run out of memory there
sooner than anywhere else. No named form needs the matrix. This guide counts what it takes, measures that, and then runs
blocks on inputs for which the matrix alone would take more memory than the machine has.

Nothing is approximated: where the matrix still fits, the results are compared with those that it gives.
"""

import ctypes
import math
import sys

import matplotlib.pyplot as plt
import torch

import nonlocal_core as nlc
from nonlocal_bench.tables import shown_bytes
from nonlocal_conformance.memory import peak_resident
from nonlocal_core.planning import exact_method
from nonlocal_torch import NonLocalBlock

FORMS = ("embedded_gaussian", "dot_product", "concatenation")
CHANNELS = 16

# %%
# What the matrix takes
# ---------------------
#
# ``nlc.cost`` counts from sizes alone what a call holds at its peak, beside its input and output. Here it is a training
# step on one image of 16 channels.


def counted(form, method, side, training=True):
    """Return the peak memory of a block on an image, in bytes, by the cost model."""
    spec = nlc.NonLocalSpec(channels=CHANNELS, pairwise=form)
    return nlc.cost(spec, (1, side, side, CHANNELS), training=training).methods[method].peak_memory


print("image       form               with the matrix  without")
for side in (64, 128, 256, 512):
    for form in FORMS:
        both = [shown_bytes(counted(form, method, side)) for method in ("pairwise", exact_method(form))]
        print(f"{side:3} x {side:3}   {form:18} {both[0]:>15}  {both[1]:>7}")

# %%
# What it takes here
# ------------------
#
# The same on this machine, as the growth of the process's memory during one training step in PyTorch. A first call on a
# small image loads what PyTorch loads only once. ``method`` names the way; ``"auto"``, the default, chooses the
# fastest. Differences of the two results are those of rounding.


def training_step(form, method, side):
    """Return the output and the gradient of a block on an image, always the same one."""
    torch.manual_seed(0)
    block = NonLocalBlock(CHANNELS, pairwise=form, zero_init=False, method=method)
    with torch.no_grad():  # weights of a size at which a difference would show
        for parameter in block.parameters():
            parameter.normal_(std=0.3)
    x = torch.randn(1, CHANNELS, side, side, requires_grad=True)
    z = block(x)
    z.square().mean().backward()
    return z.detach(), x.grad


def measured(form, method, side):
    """Return the same, and the peak memory of the step in bytes, None where the system does not tell it."""
    training_step(form, method, 16)
    if sys.platform == "linux":  # memory that was freed and kept would hide what the step takes
        ctypes.CDLL(None).malloc_trim(0)
    return peak_resident(lambda: training_step(form, method, side))


def shown(size):
    """Return a size in words."""
    return "not measured" if size is None else shown_bytes(size)


SIDE = 80
peaks = {}
for form in FORMS:
    (z, dx), peaks[form, "pairwise"] = measured(form, "pairwise", SIDE)
    (other, other_dx), peaks[form, "auto"] = measured(form, "auto", SIDE)
    error = max(((z - other).abs().max() / z.abs().max()).item(), ((dx - other_dx).abs().max() / dx.abs().max()).item())
    print(
        f"{form:18} {SIDE} x {SIDE}: {shown(peaks[form, 'pairwise'])} with the matrix, "
        f"{shown(peaks[form, 'auto'])} without; relative difference {error:.0e}"
    )
    assert error < 1e-4

# %%
# Beyond the matrix
# -----------------
#
# An image of 512 by 512 pixels has 262,144 positions. The dot product and the concatenation take it in a time that
# grows with N, not with its square. With a softmax the memory stays as small, while the time is still quadratic: here
# it gets 160 by 160 pixels.

for form, side in (("dot_product", 512), ("concatenation", 512), ("embedded_gaussian", 160)):
    (z, dx), peaks[form, side] = measured(form, "auto", side)
    matrix = 4 * (side * side) ** 2
    print(
        f"{form:18} {side} x {side}: {shown(peaks[form, side])} for a training step; "
        f"the matrix alone would have {shown_bytes(matrix)}"
    )
    assert z.isfinite().all()
    assert dx.isfinite().all()

# %%
# Rows of the weights
# -------------------
#
# To look at what a position attends to does not take the matrix either: ask for its row.

block = NonLocalBlock(CHANNELS, subsample=2)
x = torch.randn(1, CHANNELS, 512, 512)
row = block.attention(x, positions=[131_328])
print(f"{tuple(row.shape)}, sum {row.sum():.6f}")

# %%
# In one picture
# --------------
#
# Lines are the cost model's, crosses what was measured above. The model leaves out what a library needs for itself,
# such as copies and work space of its kernels, which shows where a call needs little.

figure, axes = plt.subplots(1, len(FORMS), figsize=(9.6, 3.8), sharey=True, layout="constrained")
figure.suptitle("Peak memory of a training step against the number of positions")
sides = [16, 32, 64, 128, 256, 512]
for axis, form in zip(axes, FORMS, strict=True):
    for method, colour in (("pairwise", "tab:red"), (exact_method(form), "tab:blue")):
        label = "with the matrix" if method == "pairwise" else "without"
        sizes = [counted(form, method, side) / 2**20 for side in sides]
        axis.plot([side * side for side in sides], sizes, color=colour, label=label)
    points = {"pairwise": (SIDE, "tab:red"), "auto": (SIDE, "tab:blue")}
    points |= {side: (side, "tab:blue") for side in (160, 512) if (form, side) in peaks}
    for key, (side, colour) in points.items():
        size = peaks[form, key]
        axis.plot(side * side, math.nan if size is None else size / 2**20, "x", color=colour, markersize=9)
    axis.set(title=form.replace("_", " "), xlabel="positions N", xscale="log", yscale="log")
    axis.grid(alpha=0.3)
axes[0].set_ylabel("MiB")
axes[0].legend(frameon=False)
plt.show()
