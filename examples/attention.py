"""Look at the attention
=====================

Which positions does a block look at? ``block.attention(x, positions)`` gives the rows of its weights for the positions
that you name, never the whole matrix. ``AttentionMap`` places these numbers on the grid of positions, and
``nonlocal_core.plots`` draws them.

The features here are untrained on purpose: colours and edges of a photograph. One sees by eye whether the attention
makes sense, and trained features are looked at in the same way.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from skimage import color, data, filters, transform
from torch import nn

import nonlocal_core as nlc
from nonlocal_core.plots import arrows, heatmaps
from nonlocal_torch import NonLocalBlock, attention_of, insert_nonlocal

photograph = data.chelsea()[:, :450] / 255

# %%
# Features that anybody can judge
# -------------------------------
#
# Each position of a coarser grid knows the colours around it at three scales, and how strong the edges are there. The
# features have mean 0 and length 1, so that their inner product says how alike two places look.


def features(picture, sizes):
    """Return 10 features of each position, `(H, W, 10)`."""
    lab = color.rgb2lab(picture)
    edges = filters.sobel(lab[..., 0])[..., None]
    blurred = [filters.gaussian(lab, sigma, channel_axis=-1) for sigma in (2, 5, 12)]
    blurred.append(filters.gaussian(edges, 3, channel_axis=-1))
    found = np.concatenate([transform.resize(one, sizes, anti_aliasing=False) for one in blurred], axis=-1)
    found = (found - found.mean((0, 1))) / found.std((0, 1))
    return found / np.linalg.norm(found, axis=-1, keepdims=True)


def look(block, x, places):
    """Return what a block attends to from some places, for features of shape (S1..Sk, C)."""
    sizes = x.shape[:-1]
    positions = [int(np.ravel_multi_index(place, sizes)) for place in places]
    with torch.no_grad():
        weights = block.attention(torch.from_numpy(np.moveaxis(x, -1, 0)[None]), positions)
    return nlc.AttentionMap(weights.numpy(), positions, sizes, block.spec)


# %%
# Three places in a photograph
# ----------------------------
#
# The Gaussian form has no embedding: the weights are the softmax of the inner products of the features themselves. The
# scale makes it choosy. From one eye the block finds the other, from the bright fur the bright fur, and from the
# background what is as dark and as blurred.

x = features(photograph, (60, 90))
block = NonLocalBlock(10, pairwise="gaussian", scale=15.0, dtype=torch.float64)
places = [(20, 31), (47, 40), (10, 82)]
found = look(block, x, places)
figure = heatmaps(found, photograph)

# %%
# Each query has its own scale. The triangle at the bar is the weight that each key had if all were equal: what is far
# above it was chosen. The numbers are there without a picture, too.

keys, weights = found.strongest(3)
for place, key, weight in zip(found.coordinates(), keys[0], weights[0], strict=True):
    print(f"from {place} to {found.key_coordinates()[key].tolist()}: {weight.round(4)}")

# %%
# The map of a new block of the embedded form is one flat colour until it is trained: its embeddings start so small that
# all keys weigh nearly the same.

torch.manual_seed(0)
new = look(NonLocalBlock(10, dtype=torch.float64), x, places).weights
print(f"each weight is between {new.min() / new.mean():.4f} and {new.max() / new.mean():.4f} times their mean")

# %%
# Pooled keys
# -----------
#
# With ``subsample=2`` a key is the maximum over 2 x 2 positions, and it is drawn on all four. Of the 23 rows of this
# grid the last is left over: pooling drops it, and it is no key of anything. It is still a query.

coarse = features(photograph, (23, 34))
pooled = NonLocalBlock(10, pairwise="gaussian", scale=8.0, subsample=2, dtype=torch.float64)
figure = heatmaps(look(pooled, coarse, [(17, 15), (22, 30)]), photograph)

# %%
# Weights with a sign
# -------------------
#
# In the dot product form a weight is the score divided by the number of keys, so it may be negative: what looks like
# the opposite of the query is subtracted. The scale is symmetric about 0. Here theta and phi are the identity.

signed = NonLocalBlock(10, inner_channels=10, pairwise="dot_product", dtype=torch.float64)
params = signed.export_params()
signed.import_params({**params, "theta.weight": np.eye(10), "phi.weight": np.eye(10)})
figure = heatmaps(look(signed, x, places[::2]), photograph)

# %%
# Weights that do not sum to 1
# ----------------------------
#
# The concatenation form scores a pair by ReLU(a + b), with one number a of the query and one number b of the key. So
# every query ranks the keys alike; it only moves the threshold below which a weight is 0. Here both numbers are how
# yellow a place is.

concatenated = NonLocalBlock(10, inner_channels=10, pairwise="concatenation", dtype=torch.float64)
params = concatenated.export_params()
yellow = np.zeros(10)
yellow[[2, 5]] = 1.0
changes = {"theta.weight": np.eye(10), "phi.weight": np.eye(10), "concat.weight": np.concatenate([yellow, yellow])}
concatenated.import_params({**params, **changes})
figure = heatmaps(look(concatenated, x, places), photograph)

# %%
# Across the frames of a video
# ----------------------------
#
# Figure 3 of the paper: arrows from one position to its strongest keys in all frames. The video is a crop of the
# photograph that moves and grows. The legend says what share of all the query's weight is in the arrows together.

sides = [(200 - 10 * t, 300 - 15 * t) for t in range(5)]
crops = [photograph[12 * t :, 24 * t :][:height, :width] for t, (height, width) in enumerate(sides)]
frames = np.stack([transform.resize(crop, (200, 300)) for crop in crops])
video = np.stack([features(frame, (20, 30)) for frame in frames])
block = NonLocalBlock(10, pairwise="gaussian", scale=30.0, dtype=torch.float64)
found = look(block, video, [(2, 11, 10)])
figure = arrows(found, frames)

# %%
# The same weights as heat maps, a row of frames for each query:

figure = heatmaps(found, frames=frames)

# %%
# A block inside a network
# ------------------------
#
# ``attention_of`` runs a network, takes what enters the block, and returns the same map. Here two convolutions with
# random weights turn 8 x 8 pixels into one position; that is enough for the eye to find the other eye. The background
# finds itself at the upper edge, and the eyes: their features point the same way and are longer, and here nothing makes
# all lengths equal.

torch.manual_seed(0)
network = nn.Sequential(
    nn.Conv2d(3, 32, 8, stride=4, padding=2, padding_mode="reflect"),
    nn.ReLU(),
    nn.Conv2d(32, 32, 4, stride=2, padding=1, padding_mode="reflect"),
    nn.InstanceNorm2d(32),
)
images = torch.from_numpy(np.moveaxis(photograph[:296, :448], -1, 0)[None]).float()
(insertion,) = insert_nonlocal(network, ["3"], example_input=images, pairwise="gaussian", scale=0.2)
print(insertion)

_, height, width, _ = insertion.shape
positions = [int(np.ravel_multi_index(place, (height, width))) for place in [(13, 19), (5, 51)]]
found = attention_of(network, images, "3", positions)
figure = heatmaps(found, photograph[:296, :448])
plt.show()
