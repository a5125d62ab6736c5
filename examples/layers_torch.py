r"""A block among other tools (PyTorch)
===================================

The layers of a block are layers of PyTorch. One that is a bare ``nn.Linear`` is computed together with its neighbours;
any other is called like every layer. So what tools hang on layers, or put in their place, acts in the forward pass, in
``attention`` and in what the block exports.
"""

import warnings

import torch
from torch import fx, nn
from torch.nn.utils import parametrizations, prune

from nonlocal_torch import NonLocalBlock

torch.manual_seed(0)
x = torch.randn(2, 16, 8, 6)


def new_block(**options):
    return NonLocalBlock(16, zero_init=False, **options).eval()


def as_exported(block):
    """Return a plain block with the parameters that another one exports."""
    plain = NonLocalBlock.from_spec(block.spec).eval()
    plain.import_params(block.export_params())
    return plain


# %%
# LoRA
# ----
#
# PEFT's ``LoraConfig(target_modules=["theta", "g"])`` puts a wrapper in the place of each layer that it is told. This
# one does the same by hand. What the block exports is the layer with its addition.


class LoRA(nn.Module):
    def __init__(self, base, rank):
        super().__init__()
        self.base = base.requires_grad_(requires_grad=False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, a):
        return self.base(a) + self.up(self.down(a))


block = new_block()
before = block(x)
block.theta, block.g = LoRA(block.theta, rank=2), LoRA(block.g, rank=2)
print("changed:", not torch.equal(block(x), before))
print("exported as it acts:", torch.allclose(as_exported(block)(x), block(x), atol=1e-6))
try:
    block.import_params(block.export_params())
except ValueError as error:
    print(error)

# %%
# Spectral norm and pruning
# -------------------------

block = new_block()
for layer in (block.theta, block.phi, block.g, block.out):
    parametrizations.spectral_norm(layer)
print(f"largest singular value of theta: {torch.linalg.svdvals(block.theta.weight)[0]:.2f}")
prune.l1_unstructured(block.out, "bias", amount=0.5)
print("exported as it acts:", torch.allclose(as_exported(block)(x), block(x), atol=1e-6))

# %%
# Quantisation
# ------------

block = new_block(norm="batch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PyTorch moves it to a package of its own
    quantised = torch.ao.quantization.quantize_dynamic(block, {nn.Linear})
print(type(quantised.theta).__module__)
print(f"largest change: {(quantised(x) - block(x)).abs().max():.0e}")

# %%
# Symbolic traces
# ---------------
#
# In a trace of ``torch.fx``, and so in torchvision's ``create_feature_extractor``, a block is a leaf.

network = nn.Sequential(nn.Conv2d(3, 16, 3), new_block(), nn.ReLU())
traced = fx.symbolic_trace(network)
print([(node.op, node.target) for node in traced.graph.nodes])

# %%
# A learned position bias
# -----------------------
#
# ``pairwise`` may be a module: its parameters train, move and are saved with the block. This one adds to the score of
# each pair of positions a number that is learned, so the block serves grids of one size.


class PositionBias(nn.Module):
    def __init__(self, positions):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(positions, positions))

    def forward(self, theta, phi):
        return theta @ phi.mT + self.bias


block = new_block(pairwise=PositionBias(8 * 6), normalize="softmax")
block(x).square().sum().backward()
print("pairwise.bias" in block.state_dict(), bool(block.pairwise.bias.grad.any()))
with torch.no_grad():
    block.pairwise.bias.fill_diagonal_(5)
print(f"weight of a position on itself: {block.attention(x, positions=[3])[0, 0, 3]:.2f}")
