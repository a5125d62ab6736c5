r"""Insert into a network
=====================

A new block is the identity, so it can be put into a network that is trained already: the output stays what it was,
and training goes on from there. Three questions come up each time: where to put it, how wide it must be, and whether
it was put in at all. ``insert_nonlocal`` takes the places by name, sees width and rank by running the network once, and
says what it did.

The network here is a small residual network with the module names of torchvision's ResNet-50; its weights are random.
"""

import copy

import keras
import torch
from flax import nnx
from torch import nn

import nonlocal_core as nlc
import nonlocal_jax
import nonlocal_tensorflow
from nonlocal_torch import attention_of, check_identity, insert_nonlocal, remove_nonlocal


class Residual(nn.Module):
    """A residual block."""

    def __init__(self, entering, leaving, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(entering, leaving, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(leaving)
        self.downsample = nn.Conv2d(entering, leaving, 1, stride, bias=False)

    def forward(self, x):
        return torch.relu(self.bn1(self.conv1(x)) + self.downsample(x))


class ResNet(nn.Module):
    """Four stages of residual blocks, as many as in ResNet-50."""

    def __init__(self):
        super().__init__()
        self.layer1, self.layer2 = self.stage(3, 16, 3, 2), self.stage(16, 32, 4, 2)
        self.layer3, self.layer4 = self.stage(32, 64, 6, 2), self.stage(64, 128, 3, 2)
        self.fc = nn.Linear(128, 10)

    @staticmethod
    def stage(entering, leaving, blocks, stride):
        rest = [Residual(leaving, leaving, 1) for _ in range(blocks - 1)]
        return nn.Sequential(Residual(entering, leaving, stride), *rest)

    def forward(self, x):
        return self.fc(self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3)))


torch.manual_seed(0)
model = ResNet().eval()
backbone = copy.deepcopy(model.state_dict())
images = torch.randn(2, 3, 96, 64)
expected = model(images)

# %%
# By name, or by recipe
# ---------------------
#
# ``after`` is a list of module names as ``model.named_modules()`` gives them. The options are those of
# :class:`~nonlocal_core.NonLocalSpec`, without the channels. What comes back says what was done.

(insertion,) = insert_nonlocal(model, ["layer3.4"], example_input=images, subsample=2, norm="batch")
print(insertion)
print(insertion.shape, insertion.parameters)

# %%
# A name that is not there is an error, and so is a place that cannot take a block. The network is then as it was.

try:
    insert_nonlocal(model, ["layer3.6"], example_input=images)
except ValueError as error:
    print(error)

# %%
# :func:`nonlocal_core.recipes.positions` has the places of the paper: five blocks in a ResNet-50 stand after every
# second residual block of res3 and res4. What these stages are called is known for the ResNets of torchvision, timm,
# transformers, pytorchvideo and keras.applications.

remove_nonlocal(model)
five = nlc.recipes.positions(depth=50, blocks=5)
print(five)
insertions = insert_nonlocal(model, five, example_input=images, subsample=2, norm="batch")
print(*insertions, sep="\n")
added, total = sum(insertion.parameters for insertion in insertions), sum(a.numel() for a in model.parameters())
print(f"{added:,} parameters on top of {total - added:,}")

# %%
# The network is what it was
# --------------------------
#
# The output is the same, bit for bit, in training too. The block is a child of the module after which it stands, so
# the names of all other parameters stay, and a checkpoint of the network alone still loads.

print("same output:", torch.equal(model(images), expected))
result = model.load_state_dict(backbone, strict=False)
print("unexpected:", result.unexpected_keys)
print("missing:", sorted({name.partition(".nonlocal_block")[0] for name in result.missing_keys}))

# %%
# An optimiser must be made after the insertion, or it does not know the new parameters. To ``state_dict``,
# ``deepcopy``, ``pickle``, ``torch.compile``, ``torch.export`` and ``DistributedDataParallel`` a block is a module like
# any other.

# %%
# Is it still the identity?
# -------------------------
#
# Some networks initialise every layer once more when they are complete, after the blocks have gone in: the blocks then
# add noise to trained features, and in training batch normalisation makes it as large as the features are.
# :func:`~nonlocal_torch.check_identity` notices.

check_identity(model)


def initialise(module):
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        nn.init.ones_(module.weight)


again = copy.deepcopy(model).apply(initialise)
try:
    check_identity(again)
except ValueError as error:
    print(error)
same, change = model(images) - expected, again.train()(images) - copy.deepcopy(model).train()(images)
print(f"largest output: {expected.abs().max():.2f}, changed by the insertion: {same.abs().max():.2f}")
print(f"changed by the second initialisation, in training: {change.abs().max():.2f}")

# %%
# Look inside, and take out
# -------------------------
#
# :func:`~nonlocal_torch.attention_of` runs the network and gives the weights of one of its blocks for some positions,
# here the first and the last of a grid of 12 x 8. The guide on attention draws such weights.

found = attention_of(model, images, block="layer3.5", positions=[0, 95])
print(found.weights.shape, found.sizes, found.key_sizes)

# %%
# And back to the network without blocks:

remove_nonlocal(model)
print("same names:", list(model.state_dict()) == list(backbone))

# %%
# In Keras
# --------
#
# A Keras model does not change: a new one is made of the same layers, with a layer ``<place>_nonlocal_block`` after
# each place. Both share their weights. No example input is needed, since a Keras model knows its shapes.

base = keras.applications.ResNet50(weights=None, input_shape=(96, 64, 3))
model, insertions = nonlocal_tensorflow.insert_nonlocal(base, five, subsample=2, norm="batch")
print(*insertions, sep="\n")
added = sum(insertion.parameters for insertion in insertions)
print(f"{added / 1e6:.2f} million parameters on top of {base.count_params() / 1e6:.2f}")
nonlocal_tensorflow.check_identity(model)

# %%
# In JAX
# ------
#
# In a Flax NNX module places are paths of attributes and of entries of lists. The weights come from ``rngs``.

rngs = nnx.Rngs(0)
model = nnx.Sequential(
    nnx.Conv(3, 16, (3, 3), strides=2, rngs=rngs),
    nnx.relu,
    nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs),
)
images = rngs.normal((2, 32, 48, 3))
expected = model(images)
print(*nonlocal_jax.insert_nonlocal(model, ["layers.0"], rngs=rngs, example_input=images, subsample=2), sep="\n")
print("same output:", bool((model(images) == expected).all()))
