"""Draw the summary of the benchmarks from the results in the repository, as `nonlocal bench` does.

python docs/figures/bench.py FOLDER
"""

import sys
from pathlib import Path

from nonlocal_bench.picture import draw
from nonlocal_bench.results import load

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"

if __name__ == "__main__":
    Path(sys.argv[1], "bench.png").write_bytes(draw(load(RESULTS, "*cpu"), "training"))
