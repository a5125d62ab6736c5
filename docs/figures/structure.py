"""Draw which parts of the project import which, from the imports of the code.

python docs/figures/structure.py FOLDER
"""

import ast
import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).parents[2]

PARTS = {
    "nonlocal_core": (["nonlocal_core"], "specification and reference", 1, 0),
    "nonlocal_torch": (["backends/nonlocal_torch"], "PyTorch", 0, 1),
    "nonlocal_tensorflow": (["backends/nonlocal_tensorflow"], "TensorFlow, by Keras 3", 1, 1),
    "nonlocal_jax": (["backends/nonlocal_jax"], "JAX, by Flax NNX", 2, 1),
    "nonlocal_conformance": (["conformance/nonlocal_conformance"], "checks, cases, drivers", 1, 2),
    "conformance/tests": (["conformance/tests", "conformance/peers"], "tests of all of it", 0, 3),
    "benchmarks": (["benchmarks"], "time, memory, error", 1, 3),
    "docs, examples": (["docs", "examples"], "this site", 2, 3),
}
"""From what is drawn to its folders, what it is, and where it stands: column, and row from below."""

COLUMN, ROW, WIDTH, HEIGHT = 2.2, 1.15, 1.85, 0.6


def imports(folders):
    """Return the names at the top of what the files of some folders import."""
    found = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.partition(".")[0])
            elif isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
    return found


def arrows():
    """Return each part with each package that it imports, unless another of its imports leads there."""
    direct = {name: (imports(part[0]) & PARTS.keys()) - {name} for name, part in PARTS.items()}
    return [
        (name, goal)
        for name, goals in direct.items()
        for goal in goals
        if not any(goal in direct[between] for between in goals)
    ]


def draw(ink, paper, accent):
    """Return the figure in these colours."""
    figure = Figure(figsize=(7.6, 4.9), facecolor="none")
    axes = figure.add_axes((0, 0, 1, 1))
    for name, (_, about, column, row) in PARTS.items():
        x, y = COLUMN * column, ROW * row
        box = FancyBboxPatch(
            (x - WIDTH / 2, y - HEIGHT / 2),
            WIDTH,
            HEIGHT,
            boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=paper,
            edgecolor=accent if name == "nonlocal_core" else ink,
            linewidth=1.4,
        )
        axes.add_patch(box)
        axes.text(x, y + 0.14, name, ha="center", va="center", color=ink, size=11, weight="bold")
        axes.text(x, y - 0.12, about, ha="center", va="center", color=ink, size=9)
    for name, goal in arrows():
        (_, _, start, above), (_, _, end, below) = PARTS[name], PARTS[goal]
        aside = 0.3 * (end - start)
        axes.annotate(
            "",
            (COLUMN * end - aside, ROW * below + HEIGHT / 2),
            (COLUMN * start + aside, ROW * above - HEIGHT / 2),
            arrowprops={"arrowstyle": "-|>", "color": ink, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0},
        )
    axes.set(xlim=(-1.05, 2 * COLUMN + 1.05), ylim=(-0.4, 3 * ROW + 0.4))
    axes.axis("off")
    return figure


if __name__ == "__main__":
    for theme, colours in {
        "light": ("#333333", "#ffffff", "#b4561a"),
        "dark": ("#dddddd", "#14181e", "#f0a36b"),
    }.items():
        draw(*colours).savefig(Path(sys.argv[1], f"structure_{theme}.svg"))
