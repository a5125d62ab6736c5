"""LoRA, position biases and meshes in JAX
==========================================

The projections of a Flax block are layers of Flax. What is put in their place is called, a pairwise form may be a
module with parameters of its own, and an input on a mesh of several devices stays there. This guide does all three.

For the pure function, see :doc:`/guides/plain_jax`.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"  # four devices on any processor

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from nonlocal_jax import NonLocalBlock

# %%
# LoRA on two layers
# ------------------
#
# A trained block is to be fitted to something new, and few numbers are to change. ``nnx.LoRA`` goes around ``theta``
# and ``g``; its parameters have a type of their own, by which an optimiser finds them.

rngs = nnx.Rngs(0)
block = NonLocalBlock(16, zero_init=False, rngs=rngs)
x = rngs.normal((8, 6, 5, 16))
before = block.export_params()
for name in ("theta", "g"):
    setattr(block, name, nnx.LoRA(16, 2, 8, base_module=getattr(block, name), rngs=rngs))

only = nnx.DiffState(0, nnx.LoRAParam)
optimiser = nnx.Optimizer(block, optax.adam(0.1), wrt=nnx.LoRAParam)


@nnx.jit
def step(block, optimiser):
    """Train the parameters of LoRA alone."""
    loss, gradients = nnx.value_and_grad(lambda block: jnp.mean((block(x) - 2 * x) ** 2), argnums=only)(block)
    optimiser.update(block, gradients)
    return loss


losses = [float(step(block, optimiser)) for _ in range(20)]
print(f"loss {losses[0]:.4f} before, {losses[-1]:.4f} after")
assert losses[-1] < losses[0]

# %%
# What is exported is what the layers compute: the weights with what LoRA adds.

after = block.export_params()
print("changed:", [name for name in after if not np.array_equal(after[name], before[name])])

# %%
# A learned position bias
# -----------------------
#
# A ``pairwise`` that is a module is a child of the block: its parameters are trained, moved and saved with the others.
# This one adds to each score a number that depends on how far the key is from the query.


class Biased(nnx.Module):
    """The embedded Gaussian form with a bias for each offset of a sequence."""

    def __init__(self, positions):
        """Start without any bias."""
        self.bias = nnx.Param(jnp.zeros(2 * positions - 1))
        places = np.arange(positions)
        self.offsets = nnx.static(tuple(map(tuple, (places[:, None] - places + positions - 1).tolist())))

    def __call__(self, theta, phi):
        """Return scores (B, N, M)."""
        return theta @ phi.mT + self.bias[...][jnp.asarray(self.offsets)][None]


POSITIONS = 12
shifting = NonLocalBlock(4, pairwise=Biased(POSITIONS), normalize="softmax", residual=False, zero_init=False, rngs=rngs)
print([path for path, _ in nnx.to_flat_state(nnx.state(shifting)) if path[0] == "pairwise"])

# %%
# The task is to give every position what stands three places before it, which no form without places can do.

sequences = rngs.normal((64, POSITIONS, 4))
target = jnp.roll(sequences, 3, axis=1).at[:, :3].set(0)
optimiser = nnx.Optimizer(shifting, optax.adam(0.05), wrt=nnx.Param)


@nnx.jit
def fit(block, optimiser):
    """Train all parameters, those of the bias too."""
    loss, gradients = nnx.value_and_grad(lambda block: jnp.mean((block(sequences) - target)[:, 3:] ** 2))(block)
    optimiser.update(block, gradients)
    return loss


losses = [float(fit(shifting, optimiser)) for _ in range(200)]
print(f"loss {losses[0]:.3f} before, {losses[-1]:.3f} after")
rows = np.asarray(shifting.attention(sequences[:1], positions=[8]))
print("position 8 attends to", int(rows.argmax()))
assert rows.argmax() == 5

# %%
# A mesh with explicit axes
# -------------------------
#
# On such a mesh, which ``jax.make_mesh`` makes by default, the type of an array says how it is divided. A batch that is
# divided over the devices stays so, in training as well, and no device waits for what another has.

mesh = jax.make_mesh((jax.device_count(),), ("samples",), axis_types=(jax.sharding.AxisType.Explicit,))
model = nnx.Sequential(nnx.Conv(3, 8, (3, 3), rngs=rngs), NonLocalBlock(8, subsample=2, norm="batch", rngs=rngs))
images = rngs.normal((8, 10, 12, 3))
expected = model(images)
gradient_of = nnx.jit(nnx.grad(lambda model, x: jnp.mean(model(x) ** 2)))
with jax.set_mesh(mesh):
    spread = jax.device_put(images, jax.sharding.PartitionSpec("samples"))
    z = nnx.jit(lambda model, x: model(x))(model, spread)
    gradients = gradient_of(model, spread)
print("on the mesh:", jax.typeof(z))
print("as on one device:", bool(jnp.allclose(jax.device_get(z), expected, atol=1e-5)))
