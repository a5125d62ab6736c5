"""Print how many functions of this project arrays go through in an eager forward: python benchmarks/hops.py torch jax.

A hop is a function that is given an array. Those of the operation's methods are counted apart.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from measuring.case import OURS

BACKENDS = tuple(dict.fromkeys(OURS.values()))
CASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "plain": ({}, (5, 7)),
    "batch norm": ({"norm": "batch"}, (5, 7)),
    "pooled": ({"subsample": 2}, (5, 7)),
    "axes": ({"axes": "space"}, (4, 5, 7)),
    "reassociated": ({"pairwise": "dot_product"}, (40, 40)),
    "sorted": ({"pairwise": "concatenation"}, (40, 40)),
    "streamed": ({"method": "streamed"}, (40, 40)),
}
CHANNELS = 6


def call_of(backend: str, options: dict[str, Any], sizes: tuple[int, ...]) -> Callable[[], Any]:
    """Return a call of a new block in evaluation."""
    x = np.random.default_rng(0).normal(size=(2, *sizes, CHANNELS)).astype("float32")
    if backend == "torch":
        import torch

        import nonlocal_torch

        block, tensor = nonlocal_torch.NonLocalBlock(CHANNELS, **options).eval(), torch.from_numpy(x).movedim(-1, 1)
        return torch.no_grad()(lambda: block(tensor))
    if backend == "tensorflow":
        import nonlocal_tensorflow

        layer = nonlocal_tensorflow.NonLocalBlock(CHANNELS, data_format="channels_last", **options)
        return lambda: layer(x)
    import jax.numpy as jnp
    from flax import nnx

    import nonlocal_jax

    module, array = nonlocal_jax.NonLocalBlock(CHANNELS, rngs=nnx.Rngs(0), **options), jnp.asarray(x)
    module.set_attributes(use_running_average=True)
    return lambda: module(array)


def given_to(frame: FrameType) -> Iterator[Any]:
    """Yield the arguments of a function, and what tuples and dicts among them hold; not what it is a method of."""
    for name, value in frame.f_locals.items():
        if name != "self":
            yield value
            yield from value if isinstance(value, tuple) else value.values() if isinstance(value, dict) else ()


def hops(call: Callable[[], Any]) -> Iterator[tuple[int, str]]:
    """Yield the depth and the name of each function of this project that is given an array in a call."""
    entered: list[tuple[int, str]] = []
    depth = 0

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal depth
        path = Path(frame.f_code.co_filename)
        package = next((part for part in path.parts if part.startswith("nonlocal_")), None)
        if package is None or event not in {"call", "return"}:
            return
        if event == "return":
            depth -= 1
            return
        inside = path.parts[path.parts.index(package) :]
        if any(hasattr(one, "shape") and hasattr(one, "dtype") for one in given_to(frame)):
            entered.append((depth, f"{'/'.join(inside)}:{frame.f_code.co_name}"))
        depth += 1

    call(), call()  # what is made once is made
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    # A comprehension is no function to a reader, whatever the version of Python makes of it.
    yield from ((depth, name) for depth, name in entered if ":<" not in name)


def main() -> None:
    """Print a line for each case, and with -v each hop."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("backends", nargs="+", choices=BACKENDS, metavar="backend")
    parser.add_argument("-v", "--verbose", action="store_true", help="print each hop")
    given = parser.parse_args()
    for backend in given.backends:
        for name, (options, sizes) in CASES.items():
            found = list(hops(call_of(backend, options, sizes)))
            methods = sum("/methods/" in function for _, function in found)
            lines = [f"{backend:12} {name:14} {len(found) - methods:3} hops, and {methods:3} in the method"]
            lines += [f"    {'  ' * depth}{function}" for depth, function in found if given.verbose]
            sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
