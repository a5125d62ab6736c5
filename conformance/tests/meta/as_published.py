"""Two public blocks, written anew from what they compute, and their drivers: AlexHex7's in its modes, and SlowFast's.

Their layers, names and layouts are those of the originals: channels first, convolutions of size 1, pools of PyTorch.
"""

import itertools

import torch
from from_specification import Driver
from torch import nn

from nonlocal_conformance import Case, Unsupported
from nonlocal_core import NonLocalSpec

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOLS = {1: nn.MaxPool1d(2), 2: nn.MaxPool2d((2, 2)), 3: nn.MaxPool3d((1, 2, 2))}
PAIRWISE = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
WIDTHS = {"channels": 6, "inner_channels": 4}
WINDOWS = {1: (2,), 2: (2, 2), 3: (1, 2, 2)}


def canonical(layers):
    """Return the tensors of layers under their canonical names."""
    kinds = {"weight": "weight", "bias": "bias", "mean": "running_mean", "variance": "running_var"}
    found = {
        f"{name}.{kind}": getattr(layer, own, None) for name, layer in layers.items() for kind, own in kinds.items()
    }
    return {name: a for name, a in found.items() if a is not None}


class Published(nn.Module):
    """What stands between a block with channels first and its driver."""

    def __init__(self, spec, block, rank):
        super().__init__()
        self.spec, self.block, self.rank = spec, block, rank

    def named(self):
        """Return the parameters and statistics under their canonical names."""
        return self.block.named()

    def channels_first(self, x, key_mask):
        """Return the input in the layout of the block."""
        if key_mask is not None or x.ndim != self.rank + 2:
            message = f"it has no masks, and {self.rank} axes"
            raise Unsupported(message)
        return x.movedim(-1, 1)

    def forward(self, x, key_mask=None):
        """Return z."""
        first = self.channels_first(x, key_mask)
        size = self.spec.group_size or (1 if self.spec.axes == "space" else None)
        if size is None:
            z = self.block(first)
        else:  # the groups of frames become a batch, as the network around SlowFast's block has it
            folded = first.unflatten(2, (-1, size)).movedim(2, 1).flatten(0, 1)
            z = self.block(folded).unflatten(0, (len(x), -1)).movedim(1, 2).flatten(2, 3)
        return z.movedim(1, -1)

    def attention(self, x, positions=None, key_mask=None):
        """Return rows of the weights."""
        rows = self.block(self.channels_first(x, key_mask), return_nl_map=True)[1]
        return rows if positions is None else rows[:, torch.as_tensor(positions, dtype=torch.long)]


class AlexHex7Block(nn.Module):
    """The block of AlexHex7/Non-local_pytorch, of 2019."""

    def __init__(self, in_channels, inter_channels, dimension, mode, *, sub_sample, bn_layer):
        super().__init__()
        conv, self.mode = CONVOLUTIONS[dimension], mode
        self.g = conv(in_channels, inter_channels, 1)
        self.theta = None if mode == "gaussian" else conv(in_channels, inter_channels, 1)
        self.phi = nn.Identity() if mode == "gaussian" else conv(in_channels, inter_channels, 1)
        if sub_sample:
            self.g, self.phi = nn.Sequential(self.g, POOLS[dimension]), nn.Sequential(self.phi, POOLS[dimension])
        self.W = conv(inter_channels, in_channels, 1)
        if bn_layer:
            self.W = nn.Sequential(self.W, NORMS[dimension](in_channels))
        if mode == "concatenation":
            self.concat_project = nn.Sequential(nn.Conv2d(inter_channels * 2, 1, 1, bias=False), nn.ReLU())
        for a in (self.W[1] if isinstance(self.W, nn.Sequential) else self.W).parameters():
            nn.init.zeros_(a)

    def named(self):
        """Return the parameters and statistics under their canonical names."""
        layers = {"theta": "theta", "phi": "phi", "g": "g", "concat": "concat_project", "out": "W"}
        found = {name: self._modules.get(own) for name, own in layers.items()}
        first = {name: a[0] if isinstance(a, nn.Sequential) else a for name, a in found.items()}
        return canonical({**first, "norm": self.W[1] if isinstance(self.W, nn.Sequential) else None})

    def forward(self, x, *, return_nl_map=False):
        """Return z, and the weights if they are asked for."""
        g_x = self.g(x).flatten(2).mT
        theta_x = (x if self.theta is None else self.theta(x)).flatten(2).mT
        phi_x = self.phi(x).flatten(2)
        if self.mode == "concatenation":
            queries, keys = theta_x.mT[..., None], phi_x[:, :, None, :]
            n, m = queries.shape[2], keys.shape[3]
            pairs = torch.cat([queries.expand(-1, -1, -1, m), keys.expand(-1, -1, n, -1)], dim=1)
            f = self.concat_project(pairs).squeeze(1)
        else:
            f = theta_x @ phi_x
        weights = f.softmax(-1) if self.mode.endswith("gaussian") else f / f.shape[-1]
        y = (weights @ g_x).mT.unflatten(2, x.shape[2:])
        z = self.W(y) + x
        return (z, weights) if return_nl_map else z


class SlowFastBlock(nn.Module):
    """The block of facebookresearch/SlowFast."""

    def __init__(self, dim, dim_inner, pool_size=None, instantiation="softmax", norm_eps=1e-5, norm_momentum=0.1):
        super().__init__()
        self.dim_inner, self.instantiation = dim_inner, instantiation
        self.conv_theta = nn.Conv3d(dim, dim_inner, 1)
        self.conv_phi = nn.Conv3d(dim, dim_inner, 1)
        self.conv_g = nn.Conv3d(dim, dim_inner, 1)
        self.conv_out = nn.Conv3d(dim_inner, dim, 1)
        self.bn = nn.BatchNorm3d(dim, eps=norm_eps, momentum=norm_momentum)
        self.pool = nn.Identity() if pool_size is None else nn.MaxPool3d(pool_size)

    def named(self):
        """Return the parameters and statistics under their canonical names."""
        convolutions = {name: getattr(self, f"conv_{name}") for name in ("theta", "phi", "g", "out")}
        return canonical({**convolutions, "norm": self.bn})

    def forward(self, x):
        """Return z."""
        theta = self.conv_theta(x).flatten(2)
        pooled = self.pool(x)
        phi, g = self.conv_phi(pooled).flatten(2), self.conv_g(pooled).flatten(2)
        weights = torch.einsum("bct,bcp->btp", theta, phi)
        if self.instantiation == "softmax":
            weights = (weights * self.dim_inner**-0.5).softmax(2)
        else:
            weights = weights / weights.shape[2]
        y = torch.einsum("btp,bcp->bct", weights, g).unflatten(2, x.shape[2:])
        return x + self.bn(self.conv_out(y))


class AlexHex7(Driver):
    """AlexHex7's block of one dimension, in its modes."""

    name = "as_published_alexhex7"
    capabilities = frozenset({"vjp", "hvp", "attention", "export", "train", "steps", "session"})

    def __init__(self, dimension):
        super().__init__()
        self.dimension = dimension
        self.cases = tuple(
            Case(
                f"{mode}_{norm}_{'training' if training else 'evaluation'}_{'sub_sample' if window else 'whole'}",
                {**WIDTHS, "pairwise": mode, "norm": norm, "subsample": window},
                {1: (9,), 2: (7, 5), 3: (3, 5, 4)}[dimension],
                training=training,
                narrow=training,
            )
            for mode, window in itertools.product(PAIRWISE, (None, WINDOWS[dimension]))
            for norm, training in ((None, False), ("batch", False), ("batch", True))
        )

    def made(self, spec):
        """Return a new block."""
        chosen = {name: getattr(spec, name) for name in ("channels", "inner_channels", "pairwise", "norm")}
        plain = NonLocalSpec(**chosen)
        if spec.norm == "affine" or spec not in (plain, plain.replace(subsample=WINDOWS[self.dimension])):
            message = "it has four forms, one pooling window after the projections, and batch norm or none"
            raise Unsupported(message)
        choices = {"sub_sample": spec.subsample is not None, "bn_layer": spec.norm is not None}
        block = AlexHex7Block(spec.channels, spec.inner_channels, self.dimension, spec.pairwise, **choices)
        return Published(spec, block, self.dimension)


FORMS = {"softmax": {"scale": "inner"}, "dot_product": {"pairwise": "dot_product"}}
SETS = {
    "whole": {},
    "pooled": {"subsample": (1, 2, 2)},
    "pooled_in_time": {"subsample": (2, 2, 2)},
    "groups": {"subsample": (1, 2, 2), "group_size": 2},
    "space": {"subsample": (1, 2, 2), "axes": "space"},
}


class SlowFast(Driver):
    """SlowFast's block, on cases of its own."""

    name = "as_published_slowfast"
    capabilities = frozenset({"vjp", "hvp", "export", "train", "steps", "session"})
    cases = tuple(
        Case(
            f"{form}_{sets}_{'training' if training else 'evaluation'}",
            {**WIDTHS, "norm": "batch", "subsample_at": "input", **FORMS[form], **SETS[sets]},
            (4, 5, 3),
            training=training,
            narrow=training,
        )
        for form, sets, training in itertools.product(FORMS, SETS, (False, True))
    )

    def made(self, spec):
        """Return a new block."""
        softmax = spec.pairwise == "embedded_gaussian"
        shared = ("channels", "inner_channels", "subsample", "group_size", "norm_epsilon", "norm_momentum")
        chosen = {name: getattr(spec, name) for name in shared}
        form, axes = FORMS["softmax" if softmax else "dot_product"], "space" if spec.axes == "space" else "all"
        if spec != NonLocalSpec(**chosen, **form, axes=axes, norm="batch", subsample_at="input"):
            message = "it has the softmax with a scale and the dot product, pooling of the input, and batch norm"
            raise Unsupported(message)
        names = "softmax" if softmax else "dot_product", spec.norm_epsilon, spec.norm_momentum
        return Published(spec, SlowFastBlock(spec.channels, spec.inner_channels, spec.subsample, *names), 3)
