"""One long video over two devices in Keras
========================================

What :doc:`the guide for PyTorch <cut_video>` does with processes, a strategy of TensorFlow does in one: each of its
replicas has some frames of the same video, and ``sharded_axis=0`` says along which axis they are cut. The block shares
what a position must know of the others. This part of the block is experimental, and no GPU has run it yet.
"""

import os
import subprocess
import sys

import keras
import numpy as np
import tensorflow as tf

from nonlocal_tensorflow import NonLocalBlock

keras.utils.set_random_seed(0)
video = np.random.default_rng(0).normal(size=(1, 64, 12, 12, 8)).astype("float32")  # (B, T, H, W, C): 9,216 positions

# %%
# One step of training
# --------------------
#
# The loss of a replica is that of its own frames; their sum is the loss of the video. So are the gradients of the
# parameters shares of one sum, which Keras' optimizers bring together. The running variance of the norm is that of all
# positions on every replica.


def step(block, frames):
    """Return the sum of the cubes of all values, as a share of the video's size, and the gradients."""
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(block(frames, training=True) ** 3) / video.size
    gradients = tape.gradient(loss, block.trainable_variables)
    return loss, tf.concat([tf.reshape(a, [-1]) for a in gradients], 0)


def show(form, loss, gradients, block):
    """Print what a step found."""
    variance = np.linalg.norm(block.export_params()["norm.variance"])
    print(f"{form:18} loss {loss:.4f}, gradients {np.linalg.norm(gradients):.4f}, running variance {variance:.6g}")


def new_block(form, **options):
    """Return a block whose weights are of a size at which a difference would show."""
    options |= {"pairwise": form, "subsample": 2, "norm": "batch", "residual": False}
    block, rng = NonLocalBlock(8, **options), np.random.default_rng(0)
    block.import_params({name: rng.uniform(0.1, 0.9, a.shape) for name, a in block.export_params().items()})
    return block


# %%
# One device, and two
# -------------------
#
# Outside of ``strategy.run`` the same block takes the whole. Inside each replica gives it 32 of the 64 frames.


def compare():
    """Take the same step on the whole video, and on two devices that have half of the frames each."""
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    halves = np.split(video, 2, axis=1)
    frames = strategy.experimental_distribute_values_from_function(
        lambda replica: tf.constant(halves[replica.replica_id_in_sync_group])
    )
    for form in ("embedded_gaussian", "dot_product"):
        block = new_block(form)
        show(form, *map(np.asarray, step(block, video)), block)
        with strategy.scope():
            block = new_block(form, sharded_axis=0)
        loss, gradients = tf.function(lambda frames, block=block: strategy.run(step, (block, frames)))(frames)
        total = [strategy.reduce("SUM", a, axis=None).numpy() for a in (loss, gradients)]
        show("  on two devices", *total, block)


# %%
# Virtual devices
# ---------------
#
# TensorFlow takes one CPU for two devices if it is told before it starts. Run alone, this program starts itself in a
# new process.

if "CUT_KERAS" in os.environ:
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    compare()
else:
    done = subprocess.run(  # noqa: S603 - itself
        [sys.executable, sys.argv[0]],
        env=os.environ | {"CUT_KERAS": "1"},
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    print(done.stdout, end="")
