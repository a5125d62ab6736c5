r"""Train with and without
======================

What does a network learn with a non-local block that it cannot learn without? Here is a task that needs two places far
from each other, and three small residual networks that begin as one and the same function: one as it is, one with a
further convolution of no fewer parameters than the block, and one with the block. Each is trained in PyTorch,
TensorFlow and JAX, from the same weights on the same batches.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from joblib import Parallel, delayed, parallel_config
from learning.in_torch import Network
from learning.start import MIDDLES
from learning.task import CANVAS, digits, foursomes
from learning.training import STEPS, train

from nonlocal_core import plots
from nonlocal_torch import attention_of

# %%
# The task
# --------
#
# Two of scikit-learn's handwritten digits, of the classes 0 to 3, stand at the two ends of a canvas. A network answers
# five questions: is it the same digit twice, and is each of the four classes there? Canvases come in fours: two unequal
# digits on the left, and each of them with a like and with an unlike one on the right. Every image is in as many equal
# pairs as unequal ones, so an end by itself says nothing about the first question.

training, held = digits()
canvases, labels = foursomes(held, 250, np.random.default_rng(0))
same = labels[:, 0] == 1
print(f"{len(training.classes)} digits to learn from, {len(held.classes)} others for the test, on {len(same)} canvases")

figure, axes = plt.subplots(2, 2, figsize=(8, 2.9), layout="constrained")
figure.suptitle("One four: does a canvas show the same digit twice?")
for axis, canvas, label in zip(axes.flat, canvases, same, strict=False):
    axis.imshow(canvas[..., 0], cmap="gray_r")
    axis.set(title="yes" if label else "no", xticks=[], yticks=[])

# %%
# In the first two networks no position sees both ends, so each end adds its own part to the mean over the positions,
# and to every score. With the digits :math:`a, b` on the left, :math:`c` like :math:`a` and :math:`d` like :math:`b`
# on the right, the scores of a four are then tied:
#
# .. math:: s(a, c) + s(b, d) = s(a, d) + s(b, c)
#
# The two equal pairs cannot both score above the two unequal ones: whatever such a network learns, it gives a wrong
# answer to at least one canvas of each four, and is right on at most 75 % of them. That is the first question. For the
# others it is enough to add, and a convolution can do that.
#
# The networks
# ------------
#
# A convolution that makes one position of 2 x 2 pixels, a residual block, what is compared, another residual block, the
# mean over all positions, and a linear layer; each convolution is normalised over the batch. The block is that of the
# paper: the embedded Gaussian form, with a norm that starts at 0. Each file says it in its framework's own words.
#
# .. tab-set::
#
#    .. tab-item:: PyTorch
#       :sync: torch
#
#       .. literalinclude:: /../examples/learning/in_torch.py
#
#    .. tab-item:: TensorFlow
#       :sync: tensorflow
#
#       .. literalinclude:: /../examples/learning/in_tensorflow.py
#
#    .. tab-item:: JAX
#       :sync: jax
#
#       .. literalinclude:: /../examples/learning/in_jax.py

FIRST = 100
SEEDS = {name: range(FIRST, FIRST + count) for name, count in {"PyTorch": 5, "TensorFlow": 2, "JAX": 2}.items()}
FRAMEWORKS = list(SEEDS)
NAMES = {"nothing": "as it is", "convolution": "one more convolution", "non-local block": "non-local block"}

sizes = [sum(p.numel() for p in Network(middle).parameters()) for middle in MIDDLES]
for middle, size in zip(MIDDLES, sizes, strict=True):
    print(f"{NAMES[middle]:22s}{size:6,} parameters, {size - sizes[0]:4} of them in the middle")

# %%
# The training
# ------------
#
# Stochastic gradient descent with momentum, which the three frameworks define alike as long as the rate stays the same.
# A seed decides the weights at the start and the batches. The four classes, the batch norms, the rate and the number of
# steps were chosen on the network with the block, so that it learns in this short time, by trial with other seeds and
# another division of the digits into those of the training and of the test. The bound for the other two networks does
# not depend on such choices; how near they come to it may.
#
# These networks are so small that a second thread costs more than it gives: two processes, each asked for one thread,
# run side by side and share the frameworks between them.
#
# .. literalinclude:: /../examples/learning/training.py
#    :pyobject: train

# sphinx_gallery_parallel = False
FILES = {"TensorFlow": "in_tensorflow", "PyTorch": "in_torch", "JAX": "in_jax"}
with parallel_config("loky", inner_max_num_threads=1):
    results = Parallel(n_jobs=2, max_nbytes=None)(
        delayed(train)(file, SEEDS[name], canvases, keep=name == "PyTorch") for name, file in FILES.items()
    )

found = dict(zip(FILES, results, strict=True))
runs = [(name, middle, seed) for name in FRAMEWORKS for middle in MIDDLES for seed in SEEDS[name]]
trained = {(name, middle, seed): found[name][middle, seed] for name, middle, seed in runs}
losses, scores = ({run: getattr(one, part) for run, one in trained.items()} for part in ("losses", "scores"))

# %%
# Do the frameworks agree? They differ in the order of their sums. That is the last digit of a loss at first; then
# training enlarges it, as it does any small difference.

apart = {
    (name, middle): np.abs(np.subtract(losses[name, middle, FIRST], losses["PyTorch", middle, FIRST]))
    for name in ("TensorFlow", "JAX")
    for middle in MIDDLES
}
largest = max(difference[:5].max() for difference in apart.values())
print(f"largest difference of a loss from PyTorch's in the first 5 steps: {largest:.1e}")
assert largest < 1e-4

COLOURS = dict(zip(MIDDLES, ("#777777", "#d98c21", "#1f5fa8"), strict=True))
figure, (curve, gap) = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
for middle, colour in COLOURS.items():
    curves = np.array([losses["PyTorch", middle, seed] for seed in SEEDS["PyTorch"]])
    smooth = np.apply_along_axis(np.convolve, 1, curves, np.full(10, 0.1), "valid")
    steps = np.arange(10, STEPS + 1)
    curve.fill_between(steps, smooth.min(0), smooth.max(0), color=colour, alpha=0.2, linewidth=0)
    curve.plot(steps, smooth.mean(0), color=colour, label=NAMES[middle])
    for name, style in (("TensorFlow", "-"), ("JAX", ":")):
        gap.semilogy(np.arange(1, STEPS + 1), apart[name, middle] + 1e-9, style, color=colour, linewidth=1)
curve.set(xlabel="step", ylabel="loss, mean of ten steps", ylim=0)
curve.set_title("PyTorch: mean and range of the seeds", fontsize="medium")
curve.legend(frameon=False)
gap.set(xlabel="step", ylabel="difference of the loss")
gap.set_title("the first seed, from PyTorch: TensorFlow (solid), JAX (dotted)", fontsize="medium")
for axis in (curve, gap):
    axis.spines[["top", "right"]].set_visible(False)

# %%
# With and without
# ----------------
#
# On the digits that were kept for the test, in per cent: the mean of the seeds, and their standard deviation.


def right_answers(run):
    """Return the shares of right answers: "is it the same?", and "which are there?"."""
    answers = (scores[run] > 0) == (labels == 1)
    return answers[:, 0].mean() * 100, answers[:, 1:].mean() * 100


print(f"{'':12s}{'':22s}{'the same?':>14s}{'which are there?':>20s}")
for name in FRAMEWORKS:
    for middle in MIDDLES:
        found = np.array([right_answers((name, middle, seed)) for seed in SEEDS[name]])
        cells = [f"{m:.1f} +- {d:.1f}" for m, d in zip(found.mean(0), found.std(0, ddof=1), strict=True)]
        print(f"{name:12s}{NAMES[middle]:22s}{cells[0]:>14s}{cells[1]:>20s}")

# %%
# The tie of the scores holds in every network without the block, to rounding, and with it the bound:

for run in runs:
    if run[1] != "non-local block":
        ties = scores[run][:, 0].reshape(-1, 4) @ [1, 1, -1, -1]
        assert np.abs(ties).max() < 1e-4 * np.abs(scores[run]).max()
        assert right_answers(run)[0] <= 75

figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.4), sharey=True, layout="constrained")
for axis, question in zip(axes, (0, 1), strict=True):
    for place, name in enumerate(FRAMEWORKS):
        for shift, (middle, colour) in zip((-0.2, 0, 0.2), COLOURS.items(), strict=True):
            found = [right_answers((name, middle, seed))[question] for seed in SEEDS[name]]
            axis.plot([place + shift] * len(found), found, "o", color=colour, alpha=0.6, markeredgewidth=0)
            axis.plot(place + shift, np.mean(found), "_", color=colour, markersize=16, markeredgewidth=2)
    axis.set_xticks(range(len(FRAMEWORKS)), FRAMEWORKS)
    axis.spines[["top", "right"]].set_visible(False)
axes[0].axhline(75, color="k", linestyle="--", linewidth=1)
axes[0].text(2.4, 75.5, "at most, without the block", ha="right", va="bottom", fontsize=9)
axes[0].set(title="Is it the same digit twice?", ylabel="right answers in the test, %", ylim=(40, 101))
axes[1].set(title="Which digits are there?")
_ = figure.legend(
    handles=[plt.Line2D([], [], marker="o", linestyle="", color=COLOURS[m], label=NAMES[m]) for m in MIDDLES],
    loc="outside lower center",
    ncols=3,
    frameon=False,
)

# %%
# What it attends to
# ------------------
#
# The weights of one position of a trained block, in the middle of the left digit, for an equal pair. Of the seeds in
# PyTorch it is the one with the most right answers.

best = max(SEEDS["PyTorch"], key=lambda seed: right_answers(("PyTorch", "non-local block", seed))[0])
network = trained["PyTorch", "non-local block", best].network
grid = tuple((size - 4) // 2 + 1 for size in CANVAS)


def look(canvas):
    """Draw what the middle of the left digit attends to."""
    rows, columns = np.nonzero(canvas[:, : CANVAS[1] // 2, 0])
    position = int((rows.mean() - 1) // 2 * grid[1] + (columns.mean() - 1) // 2)
    found = attention_of(network, torch.from_numpy(canvas[None]).movedim(-1, 1), positions=[position])
    return plots.heatmaps(found, image=1 - canvas[1:-1, 1:-1, 0])


figure = look(canvases[0])

# %%
# And for an unequal pair with the same left digit:

figure = look(canvases[2])

# %%
# How much of their weight do the positions of the left digit give to the right one, and how much to their own? With
# equal weights everywhere it would be the share of a digit in the canvas. Each seed finds a way of its own.

cells = canvases[:, 1:-1, 1:-1, 0].reshape(-1, grid[0], 2, grid[1], 2).max((2, 4)) > 0
at_left = np.arange(grid[1]) < grid[1] // 2
left, right = ((cells & end).reshape(len(cells), -1) for end in (at_left, ~at_left))
print(f"equal weights: {right.mean():.1%} to the other digit, {left.mean():.1%} to its own")
for seed in SEEDS["PyTorch"]:
    run = "PyTorch", "non-local block", seed
    maps = attention_of(trained[run].network, torch.from_numpy(canvases).movedim(-1, 1)).weights
    other, own = (np.einsum("bq,bqm,bm", left, maps, keys) / left.sum() for keys in (right, left))
    print(f"seed {seed}, right in {right_answers(run)[0]:.0f} %: {other:.1%} to the other digit, {own:.1%} to its own")

# %%
# What came of it, on the question that needs both places:

beyond = {middle: [right_answers(run)[0] > 75 for run in runs if run[1] == middle] for middle in MIDDLES}
for middle, found in beyond.items():
    print(f"{NAMES[middle]:22s}more than 75 % right after {sum(found)} of {len(found)} trainings")
