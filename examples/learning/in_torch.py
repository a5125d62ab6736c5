"""The networks in PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from learning.start import CHANNELS, MOMENTUM, OUTPUTS, RATE, SPEC, WIDTH, initial
from nonlocal_torch import NonLocalBlock

Array = np.ndarray[Any, Any]


class Normed(nn.Sequential):
    """A convolution and the normalisation of its output."""

    def __init__(self, entering: int, leaving: int, side: int, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(entering, leaving, side, bias=False, **options)
        self.norm = nn.BatchNorm2d(leaving)


class Residual(nn.Module):
    """x + a convolution of a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = Normed(CHANNELS, width, 3, padding=1), Normed(width, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))


class Network(nn.Module):
    """Which digits are on a canvas, and is it the same twice?"""

    def __init__(self, middle: str) -> None:
        super().__init__()
        self.stem, self.before, self.after = Normed(1, CHANNELS, 4, stride=2), Residual(CHANNELS), Residual(CHANNELS)
        if middle == "nothing":
            self.middle = nn.Identity()
        elif middle == "convolution":
            self.middle = Residual(WIDTH)
        else:
            self.middle = NonLocalBlock.from_spec(SPEC)
        self.head = nn.Linear(CHANNELS, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.before(F.relu(self.stem(x))))
        x = F.relu(self.after(self.middle(x)))
        return self.head(x.mean((2, 3)))


class Learner:
    """A network that learns."""

    def __init__(self, middle: str, seed: int) -> None:
        self.network = Network(middle)
        _load(self.network, initial(middle, seed))
        self.optimizer = torch.optim.SGD(self.network.parameters(), RATE, momentum=MOMENTUM)

    def step(self, canvases: Array, labels: Array) -> float:
        """Learn from one batch and return its loss."""
        self.network.train()
        loss = F.binary_cross_entropy_with_logits(self.network(_first(canvases)), torch.from_numpy(labels))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def logits(self, canvases: Array) -> Array:
        """Return the scores of the answers, above 0 for yes."""
        self.network.eval()
        return self.network(_first(canvases)).numpy()


def _first(canvases: Array) -> Tensor:
    """Return canvases with channels first."""
    return torch.from_numpy(canvases).movedim(-1, 1)


@torch.no_grad()
def _load(network: Network, weights: dict[str, dict[str, Array]]) -> None:
    for name, values in weights.items():
        layer = network.get_submodule(name)
        if isinstance(layer, NonLocalBlock):
            layer.import_params(values)
            continue
        for kind, value in values.items():
            # [height, width, in, out] to [out, in, height, width]
            tensor = torch.from_numpy(np.moveaxis(value, (-1, -2), (0, 1)) if kind == "kernel" else value)
            layer.get_parameter({"kernel": "weight", "scale": "weight"}.get(kind, kind)).copy_(tensor)
