"""Print up to how many weights "auto" takes the matrix: python docs/tables/limits.py."""

import sys

from nonlocal_core.planning import LIMITS, METHODS

EXACT = METHODS[2:]


def main():
    """Print the table."""
    sys.stdout.write(
        f"{'weights up to which the matrix is taken':42}" + "".join(f"{name:>14}" for name in EXACT) + "\n"
    )
    for (backend, device), limits in LIMITS.items():
        for gradients, step in ((False, "without gradients"), (True, "with gradients")):
            cells = (limits.get((name, gradients), 0) for name in EXACT)
            shown = "".join(f"{cell:14,}" if cell else f"{'none':>14}" for cell in cells)
            sys.stdout.write(f"{backend + ', ' + device + ', ' + step:42}{shown}\n")


if __name__ == "__main__":
    main()
