"""Blocks of PyTorch on an input that is cut over several processes, as devices are."""

from __future__ import annotations

import atexit
import contextlib
import functools
import shutil
import tempfile
from typing import Any

import numpy as np
import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nonlocal_conformance.driver import Array, Everything, Mask, Params, Spec
from nonlocal_conformance.processes import Processes
from nonlocal_core.spec.parameters import STATISTICS, param_shapes
from nonlocal_torch import NonLocalBlock

__all__ = [
    "cut_block",
    "cut_tensor",
    "memory",
    "mesh_of",
    "processes",
    "second_derivatives",
    "sharded",
    "traffic",
]

_STARTED: dict[int, Processes] = {}


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


def sharded(
    rank: int,
    shape: tuple[int, ...],
    axes: tuple[int | None, ...],
    spec: Spec,
    params: Params,
    x: Array,
    dz: Array,
    key_mask: Mask = None,
    *,
    training: bool = False,
    method: str = "auto",
) -> Everything | None:
    """Return in the first process what a block gives on an input that a mesh of this shape cuts, brought together.

    Args:
        rank: that of the process.
        shape: the mesh.
        axes: for each of its axes that of `x` which it cuts, 0 for the batch, or None for copies.
        spec: the block, and so are the other arguments those of a driver.
        params: as of a driver.
        x: as of a driver.
        dz: as of a driver.
        key_mask: as of a driver.
        training: as of a driver.
        method: as of a driver.
    """
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
    return None if rank else (output, {name: after[name] for name in STATISTICS if name in after}, gradient, gradients)


def second_derivatives(
    rank: int,
    shape: tuple[int, ...],
    axes: tuple[int | None, ...],
    spec: Spec,
    params: Params,
    x: Array,
    dz: Array,
    vx: Array,
    vparams: Params,
    key_mask: Mask = None,
    *,
    training: bool = False,
    method: str = "auto",
) -> tuple[Array, Params] | None:
    """Return in the first process the gradients of <gradients, v>; the arguments are those of `sharded`."""
    mesh, places = mesh_of(shape), [Replicate()] * len(shape)
    block = cut_block(spec, params, mesh, x.dtype, training=training, method=method)
    given = cut_tensor(x, mesh, axes).requires_grad_()
    names, tensors = zip(*block.named_parameters(), strict=True)
    every = (given, *tensors)
    z = block(given, None if key_mask is None else cut_tensor(key_mask, mesh, axes, has_channels=False))
    first = torch.autograd.grad(z, every, cut_tensor(dz, mesh, axes), create_graph=True)
    directions = [cut_tensor(vx, mesh, axes)]
    for name, parameter in zip(names, tensors, strict=True):
        along = torch.from_numpy(vparams[name]).reshape(parameter.shape)
        directions.append(distribute_tensor(along, mesh, places, src_data_rank=None))
    product = torch.stack([(d * v).sum() for d, v in zip(first, directions, strict=True)]).sum()
    second = [_whole(a) for a in torch.autograd.grad(product, every, materialize_grads=True)]
    shapes = param_shapes(spec)
    found = {name: a.reshape(shapes[name]) for name, a in zip(names, second[1:], strict=True)}
    return None if rank else (np.moveaxis(second[0], 1, -1), found)


class Traffic(TorchDispatchMode):
    """How many elements this process receives, from whatever collective PyTorch calls."""

    def __init__(self) -> None:
        """Start with none."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.received, self.calls = 0.0, list[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count what a collective receives."""
        result = function(*args, **(kwargs or {}))
        space, _, name = function.name().partition("::")
        name = name.partition(".")[0]
        if space in {"c10d", "_c10d_functional"} and name not in {"wait_tensor", "_wrap_tensor_autograd"}:
            count = distributed.get_world_size()
            size = (args[0][0] if isinstance(args[0], list | tuple) else args[0]).numel()
            shares = {
                "allreduce_": 2 * size * (count - 1) / count,  # a scatter of sums, and a gather of them
                "all_gather_into_tensor": size * (count - 1),
                "reduce_scatter_tensor": size * (count - 1) / count,
            }
            self.received += shares[name]  # another collective is an error
            self.calls.append(name)
        return result


class Peak(TorchDispatchMode):
    """How many bytes the results of all operations hold at once at most."""

    def __init__(self) -> None:
        """Start with none."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes, self.held = 0, dict[Any, int]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note what an operation makes, and what is gone since the last one."""
        result = function(*args, **(kwargs or {}))
        given = _storages(args)
        made = {storage: size for storage, size in _storages(result).items() if storage not in given}  # no views
        self.held = {storage: size for storage, size in (self.held | made).items() if not storage.expired()}
        self.bytes = max(self.bytes, sum(self.held.values()))
        return result


def _storages(tree: Any) -> dict[Any, int]:
    reference: Any = StorageWeakRef
    storages = [a.untyped_storage() for a in tree_leaves(tree) if type(a) is torch.Tensor]
    return {reference(storage): storage.nbytes() for storage in storages}


def traffic(
    _: int,
    shape: tuple[int, ...],
    axes: tuple[int | None, ...],
    spec: Spec,
    params: Params,
    x: Array,
    key_mask: Mask = None,
) -> tuple[tuple[float, list[str]], tuple[float, list[str]]]:
    """Return what the forward and the backward pass receive before the gradients of the parameters are summed."""
    mesh = mesh_of(shape)
    block = cut_block(spec, params, mesh, x.dtype, training=True, method="auto")
    given, dz = cut_tensor(x, mesh, axes).requires_grad_(), cut_tensor(x, mesh, axes)
    mask = None if key_mask is None else cut_tensor(key_mask, mesh, axes, has_channels=False)
    with Traffic() as forth:
        z = block(given, mask)
    with Traffic() as back:
        torch.autograd.backward(z, dz)
    return (forth.received, forth.calls), (back.received, back.calls)


def memory(
    _: int, shape: tuple[int, ...], axes: tuple[int | None, ...], spec: Spec, params: Params, x: Array, dz: Array
) -> int:
    """Return the peak bytes of a second call, forward and backward."""
    mesh = mesh_of(shape)
    block = cut_block(spec, params, mesh, x.dtype, training=True, method="auto")
    given, gradient = cut_tensor(x, mesh, axes), cut_tensor(dz, mesh, axes)
    peak = Peak()
    for context in (contextlib.nullcontext(), peak):
        leaf = given.detach().requires_grad_()
        block.zero_grad()
        with context:
            torch.autograd.backward(block(leaf), gradient)
    return peak.bytes


def _whole(a: Any) -> Array:
    return a.detach().full_tensor().numpy()
