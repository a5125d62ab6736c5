"""Draw what a block costs with and without the matrix, by the cost model.

python docs/figures/costs.py FOLDER
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

import nonlocal_core as nlc
from nonlocal_bench.tables import shown_bytes
from nonlocal_core.planning import exact_method

FORMS = ("embedded_gaussian", "dot_product", "concatenation")
SIDES = (16, 32, 64, 128, 256, 512)
CHANNELS = 64


def draw():
    """Return the figure."""
    figure = Figure(figsize=(9.2, 5.4), layout="constrained")
    axes = figure.subplots(2, len(FORMS), sharex=True, sharey="row")
    positions = [side * side for side in SIDES]
    for column, form in zip(axes.T, FORMS, strict=True):
        spec = nlc.NonLocalSpec(channels=CHANNELS, pairwise=form)
        found = [nlc.cost(spec, (1, side, side, CHANNELS), training=True).methods for side in SIDES]
        for method, style in (("pairwise", "--"), (exact_method(form), "-")):
            label = "with the matrix" if method == "pairwise" else "without"
            column[0].plot(positions, [one[method].macs for one in found], style, label=label)
            column[1].plot(positions, [one[method].peak_memory for one in found], style, label=label)
        column[0].set_title(f"{form.replace('_', ' ')}\n{exact_method(form)}")
        column[1].set_xlabel("positions N")
    for row, base, title in zip(axes, (10, 2), ("multiply-adds", "peak memory"), strict=True):
        row[0].set_ylabel(title)
        for axis in row:
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", base=base)
            axis.grid(alpha=0.3)
            axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}k" if value >= 1024 else f"{value:g}")
    axes[0, 0].legend(frameon=False)
    axes[1, 0].yaxis.set_major_formatter(lambda value, _: shown_bytes(value))
    axes[1, 0].yaxis.set_minor_formatter("")
    return figure


if __name__ == "__main__":
    draw().savefig(Path(sys.argv[1], "costs.svg"))
