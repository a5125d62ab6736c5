"""A non-local block for images in PyTorch, as one writes it from the paper: the implementation that is tested."""

import torch
from torch import nn


class Block(nn.Module):
    """The embedded Gaussian form, `(B, C, H, W)` to `(B, C, H, W)`."""

    def __init__(self, channels, inner_channels, scale=1.0):
        super().__init__()
        self.theta = nn.Conv2d(channels, inner_channels, 1)
        self.phi = nn.Conv2d(channels, inner_channels, 1)
        self.g = nn.Conv2d(channels, inner_channels, 1)
        self.out = nn.Conv2d(inner_channels, channels, 1)
        self.scale = scale

    def by_query(self, a):
        """Return `(B, C', H, W)` as `(B, N, C')`."""
        return a.flatten(2).transpose(1, 2)

    def forward(self, x):
        """Return x plus what each position gathers from all others."""
        theta, phi, g = self.by_query(self.theta(x)), self.phi(x).flatten(2), self.by_query(self.g(x))
        weights = torch.softmax(self.scale * theta @ phi, dim=2)
        y = (weights @ g).transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.out(y)
