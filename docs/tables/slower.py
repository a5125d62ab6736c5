"""Print where the results of the benchmarks show something better than this library's own choice in PyTorch.

python docs/tables/slower.py
"""

import sys
from collections import defaultdict
from pathlib import Path

from nonlocal_bench.results import load
from nonlocal_bench.tables import label, shown_bytes, shown_seconds

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
OURS = ("torch", "auto")
SHOWN = {
    "forward.Forward.time_forward": ("forward, time", shown_seconds),
    "forward.Forward.track_memory": ("forward, memory", shown_bytes),
    "training.Training.time_step": ("training step, time", shown_seconds),
    "training.Training.track_memory": ("training step, memory", shown_bytes),
    "scaling.Scaling.time_positions": ("against N, time", shown_seconds),
    "scaling.Scaling.track_memory": ("against N, memory", shown_bytes),
}
NOISE = 1.03
"""Ratios below are taken for noise."""


def main():
    """Print one line for each case in which the best is not ours."""
    run = load(RESULTS, "*cpu")
    sys.stdout.write(f"{'measured':22} {'form':18} {'where':22} {'torch':>9} {'best':>9}  by\n")
    for name, (title, shown) in SHOWN.items():
        cases = defaultdict(dict)
        for one in run.of(name):
            params = dict(one.params)
            way = params.pop("backend"), params.pop("method", "auto")
            if one.value:
                cases[tuple(params.items())][way] = one.value
        for case, values in cases.items():
            # Another framework is no choice for who uses this one.
            rivals = {way: value for way, value in values.items() if not way[0].startswith(("tensorflow", "jax"))}
            best = min(rivals, key=rivals.get)
            if OURS in rivals and rivals[OURS] > NOISE * rivals[best]:
                params = dict(case)
                form = params.pop("pairwise")
                where = " ".join(str(value) for key, value in params.items() if key not in {"device", "dtype"})
                line = f"{title:22} {form:18} {where:22} {shown(rivals[OURS]):>9} {shown(rivals[best]):>9}"
                sys.stdout.write(f"{line}  {label(*best)}\n")


if __name__ == "__main__":
    main()
