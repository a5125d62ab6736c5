"""Print what layers that join positions cost at one place of a network: python docs/tables/relations.py SHAPE."""

import math
import sys

import nonlocal_core as nlc


def rows(sizes, channels):
    """Yield name, parameters, multiply-adds and steps that wait for each other, of one sample."""
    positions = math.prod(sizes)
    taps = 3 ** len(sizes)
    yield (
        f"convolution, {' x '.join('3' * len(sizes))}",
        taps * channels**2 + channels,
        positions * taps * channels**2,
        1,
    )
    full = (positions * channels) ** 2
    yield "fully connected", full + positions * channels, full, 1
    yield "recurrent, in raster order", 2 * channels**2 + channels, 2 * positions * channels**2, positions
    blocks = {
        "self-attention, one head, C' = C": {"inner_channels": channels, "scale": "inner"},
        "embedded Gaussian, C' = C / 2": {},
        "the same, keys pooled by 2 in space": {"subsample": (1, 2, 2)[-len(sizes) :] if len(sizes) > 1 else 2},
        "dot product": {"pairwise": "dot_product"},
        "concatenation": {"pairwise": "concatenation"},
    }
    for name, options in blocks.items():
        found = nlc.cost(nlc.NonLocalSpec(channels=channels, **options), (1, *sizes, channels))
        fewest = min(found.methods, key=lambda method: found.methods[method].flops)
        shown = name if fewest == "pairwise" else f"{name}, {fewest}"
        yield shown, found.parameters, found.methods[fewest].macs, 1


def main():
    """Print the table."""
    *sizes, channels = map(int, sys.argv[1].split("x"))
    sys.stdout.write(f"{' x '.join(map(str, sizes))} positions of {channels} channels, forward\n\n")
    sys.stdout.write(f"{'layer':40} {'parameters':>18} {'multiply-adds':>18} {'steps in a row':>15}\n")
    for name, parameters, macs, steps in rows(sizes, channels):
        sys.stdout.write(f"{name:40} {parameters:18,} {macs:18,} {steps:15,}\n")


if __name__ == "__main__":
    main()
