"""Draw which positions reach which: Jacobians of a convolution, a dense and a recurrent layer and a non-local block.

python docs/figures/influence.py FOLDER
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import nonlocal_core as nlc

POSITIONS, CHANNELS = 24, 6
STEP = 1e-5


def layers():
    """Return functions `(N, C)` -> `(N, C)` by name, each with fixed parameters."""
    rng = np.random.default_rng(2)
    spec = nlc.NonLocalSpec(channels=CHANNELS, scale="inner", residual=False, bias=False)
    params = {name: 0.9 * rng.normal(size=shape) for name, shape in nlc.param_shapes(spec).items()}
    kernel = rng.normal(size=(3, CHANNELS, CHANNELS))
    dense = rng.normal(size=(POSITIONS * CHANNELS,) * 2)
    inner, into = rng.normal(size=(CHANNELS, CHANNELS)) * 0.35, rng.normal(size=(CHANNELS, CHANNELS)) * 0.5

    def convolution(x):
        padded = np.pad(x, ((1, 1), (0, 0)))
        return sum(padded[offset : offset + len(x)] @ kernel[offset] for offset in range(len(kernel)))

    def recurrent(x):
        states = [np.zeros(CHANNELS)]
        for one in x:
            states.append(np.tanh(states[-1] @ inner + one @ into))
        return np.stack(states[1:])

    return {
        "convolution of 3": convolution,
        "fully connected": lambda x: (x.ravel() @ dense).reshape(x.shape),
        "recurrent": recurrent,
        "non-local": lambda x: nlc.nonlocal_block(x[None], params, spec)[0],
    }


def influence(layer, x):
    """Return how strongly the output at i depends on the input at j, `(N, N)`: norms of blocks of the Jacobian."""
    found = np.zeros((POSITIONS, POSITIONS))
    for j in range(POSITIONS):
        for channel in range(CHANNELS):
            change = np.zeros_like(x)
            change[j, channel] = STEP
            found[:, j] += np.sum(((layer(x + change) - layer(x - change)) / (2 * STEP)) ** 2, axis=1)
    return np.sqrt(found)


def draw():
    """Return the figure."""
    rng = np.random.default_rng(8)
    inputs = {"one input": rng.normal(size=(POSITIONS, CHANNELS)), "another": rng.normal(size=(POSITIONS, CHANNELS))}
    functions = layers()
    figure = Figure(figsize=(9.2, 5.0), layout="constrained")
    axes = figure.subplots(len(inputs), len(functions), sharex=True, sharey=True)
    for row, (which, x) in zip(axes, inputs.items(), strict=True):
        for axis, (name, layer) in zip(row, functions.items(), strict=True):
            found = influence(layer, x)
            axis.imshow(found / found.max(), cmap="magma_r", vmin=0, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if axis in axes[0]:
                axis.set_title(name)
            if axis in axes[-1]:
                axis.set_xlabel("input position j")
        row[0].set_ylabel(f"{which}\noutput position i")
    return figure


if __name__ == "__main__":
    draw().savefig(Path(sys.argv[1], "influence.svg"))
