"""One configuration that is measured: what it computes, what it needs, and whether it can be measured here."""

from __future__ import annotations

import dataclasses
import math
import os
from importlib.util import find_spec
from pathlib import Path

from nonlocal_core import NonLocalSpec, planning
from nonlocal_core.spec.presets import PRESETS

__all__ = [
    "BACKENDS",
    "DEVICES",
    "DTYPES",
    "FORMS",
    "GEOMETRIES",
    "MATRIX",
    "METHODS",
    "OURS",
    "PEERS",
    "PLAIN",
    "Case",
    "free_memory",
    "grid_of",
]

OURS = {"torch": "torch", "tensorflow": "tensorflow", "tensorflow_xla": "tensorflow", "jax": "jax"}
"""The backends of this project, with the package that each needs."""

PEERS = ("mmcv", "pytorchvideo", "slowfast", "timm")
"""Other implementations, by the names of their packages and of their presets."""

MATRIX = {f"{name}_matrix": name for name in ("torch", "tensorflow", "jax")}
"""The plain matrix form in each framework, as a backend of its own beside the others."""

PLAIN = {f"{name}_plain": name for name in OURS}
"""The matrix as a reader of the paper writes it, without this project, of which no case of the suite has it."""

BACKENDS = (*OURS, *MATRIX, *PEERS)

METHODS = tuple(method for method in planning.METHODS if method != "pairwise")
"""How a backend of this project computes; the others, which know the matrix alone, have "auto"."""

FORMS = ("embedded_gaussian", "gaussian", "dot_product", "concatenation")

DEVICES = (os.environ.get("NONLOCAL_BENCH_DEVICE", "cuda" if Path("/proc/driver/nvidia").exists() else "cpu"),)
"""Where this machine computes; a look that imports nothing."""

DTYPES = ("float32",) if DEVICES == ("cpu",) else ("float32", "bfloat16")

GEOMETRIES = {
    "image-28": (128, (28, 28)),
    "image-112": (128, (112, 112)),
    "wide-28": (512, (28, 28)),
    "wide-14": (1024, (14, 14)),
    "res4-8x8": (1024, (8, 14, 14)),
    "res3-8x8": (512, (8, 28, 28)),
    "res3-32": (512, (16, 28, 28)),
    "coco-res4": (1024, (50, 84)),
    "dense-128": (128, (128, 128)),
    "sequence-4k": (256, (4096,)),
}
"""Channels and spatial sizes, by name."""

_MATRICES = {False: 2, True: 4}
"""How many N x M matrices the matrix form holds at once, without and with gradients."""

_HEADROOM = 0.8
"""How much of the free memory a benchmark may plan to use."""


def grid_of(positions: int) -> tuple[int, int]:
    """Return a grid of that many positions, a power of 2, as near to a square as can be."""
    side = 2 ** (int(math.log2(positions)) // 2)
    return side, positions // side


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration.

    Args:
        backend: one of `BACKENDS`.
        device: "cpu" or "cuda".
        pairwise: the form.
        method: one of `METHODS`.
        channels: C; C' is half of it.
        spatial: the sizes of the spatial axes.
        dtype: "float32", or "bfloat16" for operands in bfloat16 and parameters in float32.
        training: whether gradients are computed, and batch normalisation uses the statistics of the input.
        batch: B.
        mode: how PyTorch runs it: "eager", "compiled", or "graph" for what is compiled and recorded.
    """

    backend: str
    device: str
    pairwise: str
    method: str
    channels: int
    spatial: tuple[int, ...]
    dtype: str = "float32"
    training: bool = False
    batch: int = 1
    mode: str = "eager"

    @property
    def spec(self) -> NonLocalSpec:
        """What is computed; other implementations may have no bias before the norm."""
        spec = NonLocalSpec(channels=self.channels, pairwise=self.pairwise, norm="batch")
        if self.pairwise != "embedded_gaussian":
            return spec
        return spec.replace(scale="input" if self.backend == "timm" else "inner")

    @property
    def library(self) -> str:
        """The framework."""
        return "torch" if self.backend in PEERS else OURS[{**MATRIX, **PLAIN}.get(self.backend, self.backend)]

    @property
    def modules(self) -> set[str]:
        """What is imported to measure it."""
        return {f"measuring.on_{self.library}", *([f"peers.{self.backend}"] if self.backend in PEERS else [])}

    @property
    def asked(self) -> str:
        """The method by its name in this project."""
        return self.method if self.backend in OURS else "pairwise"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the input, channels last, with as many spatial axes as the implementation takes."""
        spatial = self.spatial
        if self.backend in PEERS:
            ranks = PRESETS[self.backend].ranks
            while len(spatial) < min(ranks):
                spatial = (1, *spatial)
            while len(spatial) > max(ranks):
                spatial = (spatial[0] * spatial[1], *spatial[2:])
        return (self.batch, *spatial, self.channels)

    @property
    def counted(self) -> str:
        """The method whose operations are counted: "auto" is taken to do without the matrix."""
        return planning.exact_method(self.pairwise) or "pairwise" if self.asked == "auto" else self.asked

    @property
    def positions(self) -> int:
        """N, which is M too."""
        return math.prod(self.spatial)

    @property
    def impossible(self) -> str | None:
        """Why there is nothing to measure, found without an import of a framework; None: there is."""
        package = self.backend if self.backend in PEERS else self.library
        if find_spec(package) is None:
            return f"{package} is not installed"
        if not planning.serves(self.method, self.pairwise):
            return f"{self.method} does not compute the form {self.pairwise}"
        if self.backend not in OURS and self.method != "auto":
            return f"{self.backend} knows the matrix alone"
        if self.backend in PEERS:
            if self.pairwise not in PRESETS[self.backend].forms:
                return f"{self.backend} lacks the form {self.pairwise}"
            if self.backend == "mmcv" and self.pairwise == "concatenation" and self.training:
                return "mmcv's concatenation writes over what its gradient needs"
        return None

    @property
    def too_large(self) -> str | None:
        """Why it cannot be held in the memory of this machine; None: it may be tried."""
        if self.asked != "pairwise" or self.device != "cpu":
            return None
        weights = self.batch * self.positions**2 * 4
        needed = weights * _MATRICES[self.training]
        if self.backend == "mmcv" and self.pairwise == "concatenation":
            needed = 3 * weights * self.channels  # [theta_i, phi_j] of every pair, 2 C' = C numbers, and its parts
        free = free_memory()
        if needed <= _HEADROOM * free:
            return None
        return f"out of memory: needs {needed / 2**30:,.0f} GiB, {free / 2**30:,.0f} GiB are free"

    def tiny(self) -> Case:
        """Return the same on a few positions, to warm up."""
        return dataclasses.replace(self, spatial=tuple(min(size, 4) for size in self.spatial))


def free_memory() -> float:
    """Return the bytes that a program could have."""
    status = Path("/proc/meminfo")
    if not status.exists():
        return math.inf
    lines = status.read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
