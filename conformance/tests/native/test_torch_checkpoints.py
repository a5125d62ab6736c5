"""Blocks of generative networks as PyTorch writes them: read with the numbers of their modules, and trained."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

import nonlocal_core as nlc
from nonlocal_torch import NonLocalBlock

CHANNELS = 16


class Generative(nn.Module):
    """The block of SAGAN and of BigGAN, with the names of `pretrained_biggan`."""

    def __init__(self, normalise):
        super().__init__()
        rows = {"theta": CHANNELS // 8, "phi": CHANNELS // 8, "g": CHANNELS // 2}
        for layer, count in rows.items():
            self.add_module(f"snconv1x1_{layer}", normalise(nn.Conv2d(CHANNELS, count, 1, bias=False)))
        self.snconv1x1_o_conv = normalise(nn.Conv2d(CHANNELS // 2, CHANNELS, 1, bias=False))
        self.gamma = nn.Parameter(torch.ones(1))

    def forward(self, x):
        phi, g = (nn.functional.max_pool2d(conv(x), 2).flatten(2) for conv in (self.snconv1x1_phi, self.snconv1x1_g))
        weights = (self.snconv1x1_theta(x).flatten(2).mT @ phi).softmax(-1)
        return x + self.gamma * self.snconv1x1_o_conv((g @ weights.mT).unflatten(2, x.shape[2:]))


def trained(normalise):
    """Return a block after a step of training, when the vectors of its spectral normalisation lag behind."""
    torch.manual_seed(0)
    block = Generative(normalise).double()
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    block(torch.randn(2, CHANNELS, 6, 4, dtype=torch.float64)).square().mean().backward()
    optimizer.step()
    return block.eval()


def read(block):
    """Return the parameters and the spec of a block of a network."""
    file = {f"generator.layers.8.{key}": value for key, value in block.state_dict().items()}
    [(prefix, peer)] = nlc.find_peer_blocks(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nlc.AssumedOptionsWarning)
        return nlc.from_peer(file, peer=peer, prefix=prefix)


@pytest.mark.parametrize("normalise", [nn.Identity(), spectral_norm, parametrizations.spectral_norm])
def test_a_block_of_a_generative_network_is_read_with_its_numbers(normalise):
    block = trained(normalise)
    ours = NonLocalBlock.from_spec(read(block)[1], dtype=torch.float64).eval()
    ours.import_params(read(block)[0])
    x = torch.randn(2, CHANNELS, 6, 5, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), block(x), rtol=1e-12, atol=1e-12)
        assert (block(x) - x).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["pairwise", "streamed"])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_rows_of_zeros_stay_zero_under_an_optimizer_with_decay(method, optimizer):
    params, spec = read(trained(nn.Identity()))
    block = NonLocalBlock.from_spec(spec, method=method)
    block.import_params(params)
    steps = optimizer(block.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        steps.zero_grad()
        block(torch.randn(2, CHANNELS, 6, 4)).square().mean().backward()
        steps.step()
    after = block.export_params()
    for name in ("theta.weight", "phi.weight"):
        assert not np.any(after[name][CHANNELS // 8 :])
        assert np.all(after[name][: CHANNELS // 8] != params[name][: CHANNELS // 8].astype(np.float32))
