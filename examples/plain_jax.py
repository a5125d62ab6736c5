"""Use from plain JAX
==================

The block is also a pure function: arrays and parameters in, an array out. It needs no module system, so it goes into
any JAX program, and ``jax.jit``, ``jax.grad``, ``jax.vmap`` and sharding do with it what they do with every function.
This guide trains four networks at once on a task that asks two far-apart positions to find each other, and looks at
what they learned to attend to.

For a Flax module instead, see :doc:`the page on JAX </jax>`.
"""

import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import nonlocal_core as nlc
from nonlocal_jax import attention, nonlocal_block, updated_statistics

# %%
# A spec, parameters, a function
# ------------------------------
#
# The spec says what is computed: it is frozen and hashable. The parameters are a dict of arrays, a pytree like any
# other.

KEY, CHANNELS, POSITIONS = 6, 8, 16
spec = nlc.NonLocalSpec(channels=CHANNELS, inner_channels=KEY)
params = nlc.init_params(spec, np.random.default_rng(0))
for name, array in params.items():
    print(f"{name:14} {array.shape}")

# %%
# ``spec``, ``training``, ``method`` and ``dtype`` are static under ``jax.jit``; an equal spec is not compiled again. A
# new block is the identity.

block = jax.jit(nonlocal_block, static_argnames=("spec", "training", "method", "dtype"))
x = jax.random.normal(jax.random.key(0), (2, POSITIONS, CHANNELS))
print("the identity at the start:", bool((block(x, params, spec) == x).all()))

# %%
# A task for two places
# ---------------------
#
# A sequence of positions, each with a key of six numbers, a value, and an empty slot. Every key is held by two
# positions at random places. Both are to write the sum of their two values into their slot. A convolution cannot do
# that: nothing nearby tells where the other one stands.


def batch(rng, *sizes):
    """Return sequences, what is to become of them, and for each position the place of its partner."""
    half, order = POSITIONS // 2, np.argsort(rng.random((*sizes, POSITIONS)))
    held = np.take_along_axis(rng.normal(size=(*sizes, half, KEY)), order[..., None] % half, axis=-2)
    partner = np.take_along_axis(np.argsort(order), (order + half) % POSITIONS, axis=-1)
    value = rng.normal(size=(*sizes, POSITIONS))
    both = value + np.take_along_axis(value, partner, axis=-1)
    x, target = (np.concatenate([held, value[..., None], a[..., None]], axis=-1) for a in (0 * value, both))
    return x.astype(np.float32), target.astype(np.float32), partner


# %%
# One step of training
# --------------------
#
# ``jax.grad`` of the parameters is that of ``argnums=1`` of the function, or, as here, of a loss that takes them first.
# Any optimiser for pytrees does; this one is optax's.

optimiser = optax.adam(0.02)


def loss_of(params, x, target):
    """Return the mean squared error of the slots."""
    z = nonlocal_block(x, params, spec)
    return jnp.mean(jnp.square(z - target)[..., -1])


def step(params, state, x, target):
    """Train on one batch."""
    loss, gradients = jax.value_and_grad(loss_of)(params, x, target)
    updates, state = optimiser.update(gradients, state)
    return optax.apply_updates(params, updates), state, loss


# %%
# Four networks at once
# ---------------------
#
# Parameters with a leading axis are an ensemble, and ``jax.vmap`` maps over it: four starts, four streams of data, one
# compiled program.

rng = np.random.default_rng(1)
starts = [nlc.init_params(spec, np.random.default_rng(seed)) for seed in range(4)]
trained = jax.tree.map(lambda *arrays: jnp.stack(arrays), *starts)
state = jax.vmap(optimiser.init)(trained)
together = jax.jit(jax.vmap(step))
losses = []
for _ in range(400):
    x, target, _ = batch(rng, 4, 32)
    trained, state, loss = together(trained, state, x, target)
    losses.append(loss)

x, target, partner = batch(rng, 256)
errors = jax.jit(jax.vmap(loss_of, in_axes=(0, None, None)))(trained, x, target)
print(f"mean square of the targets: {np.square(target[..., -1]).mean():.3f}")
print("mean squared errors after training:", " ".join(f"{error:.3f}" for error in errors))
assert errors.max() < 0.5

# %%
# What it attends to
# ------------------
#
# ``attention`` gives rows of the weights. In a trained network a position attends to itself and to its partner.

best = jax.tree.map(lambda array: array[errors.argmin()], trained)
weights = np.array(attention(x, best, spec))
to_partner = np.take_along_axis(weights, partner[..., None], axis=2)
to_itself = np.diagonal(weights, axis1=1, axis2=2)
print(f"weight on the partner {to_partner.mean():.2f}, on itself {to_itself.mean():.2f}, by chance {1 / POSITIONS:.2f}")

figure, axes = plt.subplots(1, 2, figsize=(9.6, 4.2), layout="constrained")
figure.suptitle("Four networks learn to find partners, and the weights of the best one")
axes[0].plot(np.array(losses))
axes[0].set(xlabel="step", ylabel="mean squared error", yscale="log", title="learning")
axes[0].grid(alpha=0.3)
shown = axes[1].imshow(weights[0], cmap="viridis", vmin=0)
axes[1].plot(partner[0], range(POSITIONS), "o", color="white", mfc="none", markersize=9, label="the partner")
axes[1].set(xlabel="key j", ylabel="position i", title="weights of one sequence")
axes[1].legend(loc="upper left", bbox_to_anchor=(0, -0.16), frameon=True, facecolor="0.5")
figure.colorbar(shown, ax=axes[1])
plt.show()

# %%
# Batch normalisation
# -------------------
#
# The function keeps nothing between calls. In training, batch normalisation takes its statistics from the input; a
# function of its own returns what the running ones become, to be put back among the parameters. They get no gradient.

normed = spec.replace(norm="batch")
params = nlc.init_params(normed, np.random.default_rng(0))
z = block(x, params, normed, training=True)
moved = updated_statistics(x, params, normed)
print({name: array.shape for name, array in moved.items()})
params |= moved

# %%
# Samples alone, and several devices
# ----------------------------------
#
# ``vmap`` over samples gives the gradient of each one. A batch that is sharded over the devices stays so: each device
# computes its own samples.


def of_sample(params, x, target):
    """Return the gradients of one sample."""
    return jax.grad(loss_of)(params, x[None], target[None])


each = jax.jit(jax.vmap(of_sample, in_axes=(None, 0, 0)))(best, x, target)
print({name: array.shape for name, array in each.items()})

mesh = jax.make_mesh((jax.device_count(),), ("samples",), axis_types=(jax.sharding.AxisType.Auto,))
spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("samples"))
z = jax.jit(functools.partial(nonlocal_block, spec=spec))(jax.device_put(x, spread), best)
print("the output is sharded as the input is:", z.sharding.is_equivalent_to(spread, z.ndim))
