"""Draw the time of the matrix over that of the method without it, from benchmarks/results/thresholds.json.

python docs/figures/thresholds.py FOLDER
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "thresholds.json"
STEPS = ("evaluation", "training")
COLOURS = {"streamed": "C0", "reassociated": "C2", "sorted": "C1"}


def draw():
    """Return the figure."""
    limits = json.loads(RESULTS.read_text(encoding="utf-8"))["limits"]
    figure = Figure(figsize=(9.2, 5.4), layout="constrained")
    axes = figure.subplots(len(STEPS), len(limits), sharex=True, sharey=True)
    for column, (backend, found) in zip(axes.T, limits.items(), strict=True):
        column[0].set_title(backend)
        column[-1].set_xlabel("positions N = M")
        for name, measured in found.items():
            method, step = name.split(", ")
            axis = column[STEPS.index(step)]
            ratios = measured["matrix / other"]
            axis.plot([int(size) for size in ratios], ratios.values(), color=COLOURS[method], marker="o", ms=3)
            if measured["limit"]:
                axis.axvline(measured["limit"] ** 0.5, color=COLOURS[method], linewidth=0.8, linestyle=":")
    for row, step in zip(axes, STEPS, strict=True):
        row[0].set_ylabel(f"{step}\ntime with the matrix / without")
        for axis in row:
            axis.axhline(1, color="black", linewidth=0.8)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", base=2)
            axis.grid(alpha=0.3)
            axis.xaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_major_formatter("{x:g}")
    lines = [axes[0, 0].plot([], [], color=colour, marker="o", ms=3)[0] for colour in COLOURS.values()]
    figure.legend(lines, list(COLOURS), loc="outside lower center", ncols=len(COLOURS), frameon=False)
    return figure


if __name__ == "__main__":
    draw().savefig(Path(sys.argv[1], "thresholds.svg"))
