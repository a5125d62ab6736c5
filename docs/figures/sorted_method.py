"""Draw the sorted method on numbers: sorted keys with the threshold of a query, its scores, and the prefix sums.

python docs/figures/sorted_method.py FOLDER
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import nonlocal_core as nlc

KEYS, INNER = 28, 6
QUERY, OTHERS = 1, (0, 2)

COUNTED, LEFT = "tab:orange", "lightgray"


def draw():
    """Return the figure; what it says of y is compared with the operation itself."""
    rng = np.random.default_rng(5)
    theta, phi = rng.normal(size=(1, 3, INNER)), rng.normal(size=(1, KEYS, INNER))
    g, weight = rng.normal(size=(1, KEYS, 1)) + 0.4, rng.normal(size=2 * INNER)
    a, b = (theta @ weight[:INNER])[0], (phi @ weight[INNER:])[0]

    order = np.argsort(-b)
    b, values = b[order], g[0, order, 0]
    plain, weighted = (np.concatenate([[0.0], np.cumsum(terms)]) for terms in (values, b * values))
    count = int(np.sum(b > -a[QUERY]))
    y = (a[QUERY] * plain[count] + weighted[count]) / KEYS
    direct = nlc.nonlocal_op(theta, phi, g, "concatenation", concat_weight=weight, method="pairwise")[0, QUERY, 0]
    np.testing.assert_allclose(y, direct)

    figure = Figure(figsize=(7.6, 7.4), layout="constrained")
    keys, scores, sums = figure.subplots(3, sharex=True, height_ratios=(1.15, 1, 1.1))
    ranks = np.arange(1, KEYS + 1)
    colours = [COUNTED if rank <= count else LEFT for rank in ranks]
    keys.bar(ranks, b, color=colours)
    keys.axhline(-a[QUERY], color="black", linewidth=1.2)
    keys.text(KEYS + 0.4, -a[QUERY], f" $-a_i$ = {-a[QUERY]:.2f}", va="bottom", ha="right", fontsize=9)
    for other in OTHERS:
        keys.axhline(-a[other], color="gray", linewidth=0.8, linestyle=":")
    keys.set_ylabel("$b_j$, descending")
    keys.set_title("1. Sort the keys once; those above a query's threshold count", loc="left")

    scores.bar(ranks, np.maximum(a[QUERY] + b, 0), color=COUNTED)
    scores.set_ylabel("$s_{ij}$ = ReLU($a_i + b_j$)")
    scores.set_title(f"2. Its scores are $a_i + b_j$ on the first $k_i$ = {count} keys, and 0 behind them", loc="left")

    steps = np.arange(KEYS + 1)
    for name, line, colour in (("G", plain, "tab:blue"), ("H", weighted, "tab:green")):
        sums.step(steps, line, where="mid", color=colour, label=f"{name}[k]")
        sums.plot(count, line[count], "o", color=colour)
        sums.annotate(f"{line[count]:.2f}", (count, line[count]), (6, 6), textcoords="offset points", fontsize=9)
    sums.axhline(0, color="black", linewidth=0.6)
    sums.legend(frameon=False, loc="lower left")
    sums.set(xlabel="k: so many keys from the largest b on", ylabel="sums over the first k keys")
    sums.set_title(
        f"3. $y_i$ = ({a[QUERY]:.2f} x {plain[count]:.2f} + {weighted[count]:.2f}) / {KEYS} = {y:.4f}; "
        f"over all pairs: {direct:.4f}",
        loc="left",
    )
    for axis in (keys, scores, sums):
        axis.axvline(count + 0.5 * (axis is not sums), color="black", linewidth=0.8, linestyle="--")
        axis.title.set_fontsize(10)
        axis.spines[["top", "right"]].set_visible(False)
    keys.text(count + 0.7, keys.get_ylim()[1], "$k_i$", va="top")
    return figure


if __name__ == "__main__":
    draw().savefig(Path(sys.argv[1], "sorted_method.svg"))
