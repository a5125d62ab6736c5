"""A megapixel over four processes
===============================

Non-local means over all pixels of a megapixel picture weighs a million million pairs. Nothing holds them at once, so
memory is no obstacle; time is. Cut over devices, each denoises its rows, and all that it needs of the others is their
keys and values. Here four processes of one machine stand for four devices. They share its cores, so they are no faster
than one; that they find the same picture, and how little they send each other, is what they show.

``python examples/cut_picture.py 1024`` takes a whole megapixel, the picture enlarged: 23 minutes of a machine with two
cores, 38 of processor time, from 19.99 dB with noise to 31.35 dB. This page takes a crop.
"""

import os
import subprocess
import sys
import time

import numpy as np
import torch
from skimage.transform import resize
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

import nonlocal_core as nlc
from nonlocal_core.commands.demo.denoise import default_strength, operands, psnr
from nonlocal_core.commands.demo.picture import built_in
from nonlocal_torch import NonLocalBlock
from nonlocal_torch.parallel import PositionParallel

PROCESSES, NOISE = 4, 0.1
side = int(sys.argv[1]) if len(sys.argv) > 1 else 96
clean = built_in(side) if side <= 512 else resize(built_in(512), (side, side, 1), order=3).clip(0, 1)
noisy = clean + np.random.default_rng(0).normal(scale=NOISE, size=clean.shape)

# %%
# A block that denoises
# ---------------------
#
# :doc:`/guides/denoise` writes non-local means as the operation, with theta :math:`(2 u_i, 1)` and phi
# :math:`(u_j, -|u_j|^2)` for patches and places :math:`u`. With phi and the pixel for channels, both are linear in the
# channels, and so are the values: what denoises is a block of which no weight was trained.

_, phi, g = operands(noisy, strength=default_strength(NOISE, patch=5), patch=5, reach=4.0)
channels = np.concatenate([phi, g], axis=2).astype(np.float32)
inner = phi.shape[2]
spec = nlc.NonLocalSpec(channels=inner + 1, inner_channels=inner, residual=False)
params = {name: np.zeros(shape) for name, shape in nlc.param_shapes(spec).items()}
params["theta.weight"][:-1, : inner - 1] = 2 * np.eye(inner - 1)
params["theta.bias"][-1] = 1
params["phi.weight"][:, :inner] = np.eye(inner)
params["g.weight"][0, inner] = 1
params["out.weight"][inner, 0] = 1
x = torch.from_numpy(channels.reshape(1, side, side, -1)).movedim(-1, 1).contiguous()
block, alone = (NonLocalBlock.from_spec(spec).eval() for _ in range(2))
for one in (block, alone):
    one.import_params(params)


def denoised(block, part):
    """Return the pixels that a block makes of some rows, and how long it took."""
    start = time.perf_counter()
    with torch.no_grad():
        z = block(part)
    return z[:, -1], time.perf_counter() - start


# %%
# Four processes
# --------------
#
# Each takes its rows of the picture. ``PositionParallel`` takes a plain tensor for the part of its process.


def four_processes():
    """Denoise a quarter of the rows here, and put the picture together in the first process."""
    distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (PROCESSES,), mesh_dim_names=("rows",))
    cut = parallelize_module(nn.Sequential(block), mesh, {"0": PositionParallel(axis=0)})
    part, seconds = denoised(cut, x.chunk(PROCESSES, dim=2)[distributed.get_rank()])
    parts = [torch.empty_like(part) for _ in range(PROCESSES)]
    distributed.all_gather(parts, part)
    if distributed.get_rank() == 0:
        picture = torch.cat(parts, dim=1)[0, ..., None].numpy()
        print(f"{psnr(clean, noisy):.2f} dB with noise, {psnr(clean, picture):.2f} dB denoised")
        print(f"four processes, each a quarter of the work: {seconds:.1f} s")
        if side <= 128:
            pixels, seconds = denoised(alone, x)
            difference = np.abs(pixels[0, ..., None].numpy() - picture).max()
            print(f"one process: {seconds:.1f} s, and the largest difference of a pixel is {difference:.0e}")
    distributed.destroy_process_group()


if "RANK" in os.environ:
    four_processes()
else:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(  # noqa: S603 - itself
        [*command, sys.argv[0], str(side)], env=environment, check=True, capture_output=True, text=True
    )
    print(f"{side} x {side} pixels: {done.stdout}", end="")
    # Counted for the megapixel: what a device receives, keys and values of the others, and what it holds at its peak.
    # The matrix of weights would have four million megabytes.
    for devices in (1, PROCESSES):
        cost = nlc.cost(spec, (1, 1024, 1024, inner + 1), devices=devices).methods["streamed"]
        sizes = (f"{size / 2**20:.0f} MiB" for size in (cost.bytes_received, cost.peak_memory))
        print("a megapixel, {} device(s): {} received, {} at the peak".format(devices, *sizes))
