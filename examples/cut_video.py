"""One long video over two processes
=================================

A video whose positions need more memory than one device has can be cut over several: each keeps its frames, and the
block shares what a position must know of the others, no more. Here two processes of this machine stand for two devices,
and print the same numbers as one process with the whole video. On GPUs only ``"gloo"`` and ``"cpu"`` below change;
nobody has run that yet, nor several machines.
"""

import os
import subprocess
import sys

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

from nonlocal_torch import NonLocalBlock
from nonlocal_torch.parallel import PositionParallel

torch.manual_seed(0)  # the same video and the same weights in each process
video = torch.randn(1, 8, 64, 12, 12)  # (B, C, T, H, W): 9,216 positions
blocks = {
    form: NonLocalBlock(8, pairwise=form, subsample=2, norm="batch", residual=False)
    for form in ("embedded_gaussian", "dot_product", "concatenation")
}
for parameter in nn.ModuleList(blocks.values()).parameters():  # of a size at which a difference would show
    nn.init.normal_(parameter, std=0.5)


def whole(a):
    """Return a tensor in one piece; every process takes part."""
    return a.full_tensor() if hasattr(a, "full_tensor") else a


def show(form, loss, block):
    """Print what a step of training found."""
    gradients = torch.cat([whole(p.grad).flatten() for p in block.parameters()])
    numbers = loss.item(), gradients.norm().item(), whole(block.norm.running_var).norm().item()
    if os.environ.get("RANK", "0") == "0":
        print(f"{form:18} loss {numbers[0]:.4f}, gradients {numbers[1]:.4f}, running variance {numbers[2]:.4f}")


# %%
# One process
# -----------
#
# A loss whose gradient is not the same everywhere, and its gradients. The running variance of the norm is that of all
# positions.


def loss_of(z):
    """Return the sum of the cubes of all values, as a share of the video's size."""
    return (z**3).sum() / video.numel()


def one_process():
    """Take one step on the whole video."""
    for form, block in blocks.items():
        loss = loss_of(block(video))
        loss.backward()
        show(form, loss.detach(), block)


# %%
# Two processes
# -------------
#
# The mesh has one axis, "time". ``PositionParallel`` makes the parameters of a block replicated, and takes what its
# process holds of the video: 32 of 64 frames. The loss of each process is that of its own frames; their sum is the loss
# of the video. The gradients of the parameters are shares of one sum, and an optimizer brings them together.


def two_processes():
    """Take the same step where each process has half of the frames."""
    distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("time",))
    frames = distribute_tensor(video, mesh, [Shard(2)]).to_local()
    for form, block in blocks.items():
        cut = parallelize_module(nn.Sequential(block), mesh, {"0": PositionParallel(axis=0)})
        loss = loss_of(cut(frames))
        loss.backward()
        total = loss.detach().clone()
        distributed.all_reduce(total)
        show(form, total, block)
    distributed.destroy_process_group()


# %%
# Both
# ----
#
# Run alone, this program starts PyTorch's ``torchrun`` on itself.

if "RANK" in os.environ:
    two_processes()
else:
    print("one process:")
    one_process()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", sys.argv[0]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(  # noqa: S603 - itself
        command, env=environment, check=True, capture_output=True, text=True, timeout=300
    )
    print(f"two processes:\n{done.stdout}", end="")

# %%
# What is sent
# ------------
#
# The dot product sends C' x D sums, whatever the length of the video; the concatenation sends one number for each key
# beside its value; the softmax forms send keys and values, which pooling makes few. Along an axis on which positions do
# not interact (``axes="space"`` here) and between groups of frames nothing is sent but the statistics of the norm.
# :ref:`The page on PyTorch <positions-over-devices>` says more.
