"""Draw how a block with pooled keys still gives one sum for each position: N x M weights times M values are N sums.

python docs/figures/pooled_keys.py FOLDER
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import nonlocal_core as nlc

SIZES, WINDOW, INNER = (4, 6), 2, 3
QUERY, KEY = 8, 4
"""What is marked: one position, and one key."""

MARK, OTHER = "tab:orange", "tab:blue"


def computed():
    """Return x, the weights, g, y and z of a small block; they are what the reference computes."""
    rng = np.random.default_rng(3)
    spec = nlc.NonLocalSpec(channels=4, inner_channels=INNER, subsample=WINDOW, scale="inner", bias=False)
    params = {name: 0.8 * rng.normal(size=shape) for name, shape in nlc.param_shapes(spec).items()}
    x = rng.normal(size=(1, *SIZES, spec.channels))
    weights = nlc.attention(x, params, spec)[0]
    height, width = SIZES
    projected = (x[0] @ params["g.weight"].T).reshape(height // WINDOW, WINDOW, width // WINDOW, WINDOW, INNER)
    g = projected.max(axis=(1, 3)).reshape(-1, INNER)
    y = weights @ g
    z = nlc.nonlocal_block(x, params, spec)[0]
    np.testing.assert_allclose(z, x[0] + (y @ params["out.weight"].T).reshape(x[0].shape))
    return x[0], weights, g, y, z


def matrix(axis, values, left, bottom, title, *, cell=1.0, colours="Greys"):
    """Draw a matrix with square cells; return the function that frames a part of it."""
    rows, columns = values.shape
    right, top = left + cell * columns, bottom + cell * rows
    axis.imshow(values, extent=(left, right, bottom, top), cmap=colours, aspect="equal", interpolation="nearest")
    for row in range(rows + 1):
        axis.plot([left, right], [bottom + cell * row] * 2, color="white", linewidth=0.6)
    for column in range(columns + 1):
        axis.plot([left + cell * column] * 2, [bottom, top], color="white", linewidth=0.6)
    axis.text((left + right) / 2, top + 0.7, title, ha="center", va="bottom", fontsize=11)

    def frame(row, column, height, width, colour):
        corner = (left + cell * column, top - cell * (row + height))
        axis.add_patch(Rectangle(corner, cell * width, cell * height, fill=False, edgecolor=colour, linewidth=2))

    return frame


def draw():
    """Return the figure."""
    x, weights, g, y, z = computed()
    queries, keys = weights.shape
    figure = Figure(figsize=(9.6, 5.4), layout="constrained")
    axis = figure.subplots()
    row, column = np.unravel_index(QUERY, SIZES)
    key_row, key_column = np.unravel_index(KEY, [size // WINDOW for size in SIZES])
    across = f"{SIZES[0]} x {SIZES[1]}"

    frame = matrix(axis, x[..., 0], 0, 14, f"x\n{across} = {queries} queries i")
    frame(row, column, 1, 1, MARK)
    pooled = g[:, 0].reshape(SIZES[0] // WINDOW, SIZES[1] // WINDOW)
    frame = matrix(axis, pooled, 0, 5, f"windows of {WINDOW} x {WINDOW}\n{keys} keys j", cell=WINDOW)
    frame(key_row, key_column, 1, 1, OTHER)

    frame = matrix(axis, weights, 11, 0, f"weights\nN x M = {queries} x {keys}", colours="Purples")
    frame(QUERY, 0, 1, keys, MARK)
    frame(0, KEY, queries, 1, OTHER)
    axis.text(18.6, 12, "x", ha="center", va="center", fontsize=15)
    frame = matrix(axis, g, 20.2, 9, f"g\nM x C' = {keys} x {INNER}")
    frame(KEY, 0, 1, INNER, OTHER)
    axis.text(24.8, 12, "=", ha="center", va="center", fontsize=15)
    frame = matrix(axis, y, 26.4, 0, f"y\nN x C' = {queries} x {INNER}")
    frame(QUERY, 0, 1, INNER, MARK)
    axis.annotate("", (34, 12), (30, 12), arrowprops={"arrowstyle": "->"})
    axis.text(32, 12.5, "rows back\non the grid", ha="center", va="bottom", fontsize=10)
    frame = matrix(axis, z[..., 0], 35, 10, f"z = x + W y\n{across}, as x")
    frame(row, column, 1, 1, MARK)
    axis.text(
        20.5,
        -1.2,
        f"one row of weights for each of the {queries} queries, one column for each of the {keys} keys:\n"
        "the sum over j removes the keys, not the queries",
        ha="center",
        va="top",
        fontsize=11,
    )
    axis.set(xlim=(-2, 42.5), ylim=(-4, 28))
    axis.set_axis_off()
    return figure


if __name__ == "__main__":
    draw().savefig(Path(sys.argv[1], "pooled_keys.svg"))
