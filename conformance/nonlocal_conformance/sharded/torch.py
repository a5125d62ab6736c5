"""Blocks of PyTorch on an input that is cut over several processes, as devices are."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from typing import Any

import numpy as np
import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module, distribute_tensor

from nonlocal_conformance.driver import Array, Mask, Params, Spec
from nonlocal_conformance.processes import Processes
from nonlocal_core.spec.parameters import STATISTICS, param_shapes
from nonlocal_torch import NonLocalBlock

__all__ = ["cut_block", "cut_tensor", "mesh_of", "processes", "sharded", "work"]

_STARTED: dict[int, Processes] = {}


def sharded(
    spec: Spec,
    params: Params,
    x: Array,
    key_mask: Mask,
    dz: Array,
    axis: int | tuple[int | None, ...],
    devices: int | tuple[int, ...],
    *,
    training: bool = False,
    method: str = "auto",
) -> tuple[Array, Array, Params, Params]:
    """Return z, the gradients of x and of the parameters, and the running statistics, of a cut input; all whole.

    Args:
        spec: the block.
        params: its parameters.
        x: `(B, S1..Sk, C)`.
        key_mask: `(B, S1..Sk)`, or None.
        dz: the gradient of z.
        axis: which axis of `x` the devices cut, 0 for the batch; for a mesh one for each of its axes, None for copies.
        devices: how many, or the shape of a mesh.
        training: whether batch normalisation takes its statistics from `x`.
        method: how the operation is computed.

    Raises:
        ValueError: if the block refuses the cut, on every device.
    """
    shape = (devices,) if isinstance(devices, int) else devices
    axes = axis if isinstance(axis, tuple) else (axis,)
    count = int(np.prod(shape))
    return processes(count)(work, shape, axes, spec, params, x, key_mask, dz, training, method)[0]


def processes(count: int) -> Processes:
    """Return so many processes in one group, the same on every call unless they had to be ended."""
    if count not in _STARTED or _STARTED[count].is_closed:
        folder = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        _STARTED[count] = Processes(count, __name__)
        _STARTED[count](_join, count, f"{folder}/meeting")
    return _STARTED[count]


@functools.cache
def mesh_of(shape: tuple[int, ...]) -> DeviceMesh:
    """Return the mesh of this shape, in one of the processes; its axes are "a", "b" and so on."""
    return init_device_mesh("cpu", shape, mesh_dim_names=tuple("abc"[: len(shape)]))


def cut_tensor(a: Array, mesh: DeviceMesh, axes: tuple[int | None, ...], *, has_channels: bool = True) -> DTensor:
    """Return an array as a tensor with channels first that is cut along these axes of the array."""
    places: list[Placement] = [
        Replicate() if axis is None else Shard(axis + (has_channels and axis > 0)) for axis in axes
    ]
    tensor = torch.from_numpy(a)
    tensor = (tensor.movedim(-1, 1) if has_channels else tensor).contiguous()
    return distribute_tensor(tensor, mesh, places, src_data_rank=None)  # every process has the whole


def cut_block(
    spec: Spec, params: Params, mesh: DeviceMesh, dtype: Any, *, training: bool, method: str
) -> NonLocalBlock:
    """Return a block that every device of the mesh has a copy of."""
    block = NonLocalBlock.from_spec(spec, method=method, dtype=getattr(torch, dtype.name))
    block.import_params(params)
    distribute_module(block, mesh)
    return block.train(training)


def _join(rank: int, count: int, meeting: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count)


def work(
    rank: int,
    shape: tuple[int, ...],
    axes: tuple[int | None, ...],
    spec: Spec,
    params: Params,
    x: Array,
    key_mask: Mask,
    dz: Array,
    training: bool,
    method: str,
) -> tuple[Array, Array, Params, Params] | None:
    """Do in one process what `sharded` says; the first has the result."""
    mesh = mesh_of(shape)
    block = cut_block(spec, params, mesh, x.dtype, training=training, method=method)
    given = cut_tensor(x, mesh, axes).requires_grad_()
    mask = None if key_mask is None else cut_tensor(key_mask, mesh, axes, has_channels=False)
    z = block(given, mask)
    torch.autograd.backward(z, cut_tensor(dz, mesh, axes))
    # Every process takes part in what brings the pieces together.
    gradients = {name: _whole(p.grad).reshape(param_shapes(spec)[name]) for name, p in block.named_parameters()}
    output, gradient = (np.moveaxis(_whole(a), 1, -1) for a in (z, given.grad))
    after = block.export_params()
    return None if rank else (output, gradient, gradients, {name: after[name] for name in STATISTICS if name in after})


def _whole(a: Any) -> Array:
    return a.detach().full_tensor().numpy()
