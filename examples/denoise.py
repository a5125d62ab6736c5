"""Denoise a photograph
====================

Non-local means, a denoiser of 2005, is the non-local operation with features that nobody trained: the patch around
each pixel. So the operation can be judged by eye, on a photograph, without a network. This guide computes it with the
NumPy reference and with PyTorch, over all pairs of pixels, and looks at the weights of one of them.

The command ``nonlocal demo`` does the same for a photograph of your own and with every installed framework.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import LogNorm
from skimage.filters import gaussian

import nonlocal_core as nlc
from nonlocal_core.commands.demo.denoise import default_strength, operands, pixel_weights, psnr
from nonlocal_core.commands.demo.picture import built_in, strong_edge
from nonlocal_torch import nonlocal_op

# %%
# A photograph with noise
# -----------------------
#
# Grey values are between 0 and 1, and the noise has a standard deviation of 0.1. The peak signal-to-noise ratio (PSNR)
# says how near two pictures are: 10 dB more is a tenth of the mean squared error.

clean = built_in(128)
noise = 0.1
noisy = clean + np.random.default_rng(0).normal(scale=noise, size=clean.shape)
print(f"{clean.shape[0]} x {clean.shape[1]} pixels, {psnr(clean, noisy):.2f} dB with noise")

# %%
# Non-local means as the operation
# --------------------------------
#
# A pixel becomes the mean of all pixels, weighted by how alike the patches around them are and how near they stand:
#
# .. math:: w_{ij} \propto \exp\left(-\frac{|p_i - p_j|^2}{h^2} - \frac{|q_i - q_j|^2}{s^2}\right)
#
# with the patches :math:`p` and the positions :math:`q`. With :math:`u = (p / h, q / s)` the exponent is
# :math:`2 u_i \cdot u_j - |u_j|^2 - |u_i|^2`, and a softmax over :math:`j` drops the last term. What is left is an
# inner product of :math:`\theta_i = (2 u_i, 1)` and :math:`\phi_j = (u_j, -|u_j|^2)`. The values
# :math:`g_j` are the pixels.

strength = default_strength(noise, patch=5)
theta, phi, g = operands(noisy, strength=strength, patch=5, reach=4.0)
print(f"theta {theta.shape}, phi {phi.shape}, g {g.shape}")
print(f"the matrix of weights would have {theta.shape[1] * phi.shape[1]:,} entries")

# %%
# ``method="streamed"`` goes through the keys in blocks and never holds that matrix.

reference = nlc.nonlocal_op(theta, phi, g, method="streamed")
denoised = reference.reshape(clean.shape)
print(f"denoised: {psnr(clean, denoised):.2f} dB")

# %%
# The same call in PyTorch, in single precision:

narrow = [torch.from_numpy(a.astype(np.float32)) for a in (theta, phi, g)]
y = nonlocal_op(*narrow)
print(f"largest difference from the reference: {np.abs(y.numpy() - reference).max():.1e}")

# %%
# What one pixel attends to
# -------------------------
#
# The pixel with the cross stands on a strong edge. Its weights follow the edge: pixels on the same side, with a like
# neighbourhood, take part; pixels as near but across the edge do not. A blur would mix both.

row, column = strong_edge(clean)
weights = pixel_weights(theta, phi, row * clean.shape[1] + column).reshape(clean.shape[:2])

figure, axes = plt.subplots(2, 2, figsize=(8, 8.4), layout="constrained")
figure.suptitle("A photograph, with noise, denoised, and the weights of one pixel")
panels = {
    "clean": clean,
    f"noise, {psnr(clean, noisy):.2f} dB": noisy,
    f"denoised, {psnr(clean, denoised):.2f} dB": denoised,
    "weights of the marked pixel": denoised,
}
for axis, (title, image) in zip(axes.flat, panels.items(), strict=True):
    axis.imshow(image, cmap="gray", vmin=0, vmax=1)
    axis.set_title(title)
    axis.set_axis_off()
largest = weights.max()
shown = np.ma.masked_less(weights, largest / 1e4)
colours = axes[1, 1].imshow(shown, cmap="plasma", norm=LogNorm(largest / 1e4, largest), alpha=0.75)
axes[1, 1].plot(column, row, "+", color="white", markersize=14, markeredgewidth=2)
axes[1, 1].set(xlim=(column - 20.5, column + 20.5), ylim=(row + 20.5, row - 20.5))
figure.colorbar(colours, ax=axes[1, 1], shrink=0.9)
plt.show()

# %%
# How far to look
# ---------------
#
# The reach :math:`s` says how soon a pixel is too far away to count. Without it every pixel of the picture may answer,
# and the many that look alike by chance add a little of the wrong thing. The last line is what a Gaussian blur gives,
# at the width that is best for this picture.

for reach in (2.0, 4.0, 8.0, np.inf):
    arrays = operands(noisy, strength=strength, patch=5, reach=reach)
    found = nonlocal_op(*(torch.from_numpy(a.astype(np.float32)) for a in arrays))
    print(f"reach {reach:4}: {psnr(clean, found.numpy().reshape(clean.shape)):.2f} dB")


blurred = max(psnr(clean, gaussian(noisy, sigma, channel_axis=-1)) for sigma in np.arange(0.4, 2.0, 0.1))
print(f"a Gaussian blur: {blurred:.2f} dB")

# %%
# In a network the features are learned instead, and the block adds the result to its input. The
# :ref:`specification <the-operation>` has the formulas of both.
