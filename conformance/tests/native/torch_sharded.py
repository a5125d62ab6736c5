"""What several processes do together in the tests of cut inputs; they find these functions by name."""

import os
import time
import warnings
from unittest import mock

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch_blocks import random, random_block

from nonlocal_conformance.sharded.torch import mesh_of, sharded
from nonlocal_torch import norms
from nonlocal_torch import sharded as adapter
from nonlocal_torch.parallel import PositionParallel

SHAPE = (4, 6, 8, 5)


def whole(a):
    return a.full_tensor() if isinstance(a, DTensor) else a


def hang(rank):
    """Wait in the first process for all others."""
    time.sleep(60 * (rank == 0))


def leave(rank):
    """End the last process."""
    if rank:
        os._exit(1)


def raised(rank, name):
    """Return the error of this process alone."""
    mesh = mesh_of((4,))

    def cut(*shape, dim, dtype=torch.float64):
        return distribute_tensor(random(*shape).to(dtype), mesh, [Replicate() if dim is None else Shard(dim)])

    blocks = {
        "window": {"subsample": 2},
        "groups": {"group_size": 2},
        "last window": {"subsample": 4},
        "sharded parameters": {},
        "another norm": {"norm": "batch"},
        "synchronised with others": {"norm": "batch"},
    }
    inputs = {
        "window": (cut(2, 6, 12, dim=2),),
        "last window": (cut(2, 6, 14, dim=2),),
        "groups": (cut(2, 6, 12, 2, 2, dim=2),),
        "no position": (cut(2, 6, 9, dim=2),),
        "channels": (cut(2, 6, 8, dim=1),),
        "partial": (DTensor.from_local(random(2, 6, 8), mesh, [Partial()]),),
        "plain mask": (cut(2, 6, 8, dim=2), torch.ones(2, 2, dtype=torch.bool)),
        "whole plain mask": (cut(2, 6, 8, dim=2), torch.ones(2, 8, dtype=torch.bool)),
        "mask alone": (random(2, 6, 8), cut(2, 8, dim=1, dtype=torch.bool)),
        "mask cut otherwise": (cut(2, 6, 8, dim=2), cut(2, 8, dim=0, dtype=torch.bool)),
        "one value": (cut(1, 6, 1, dim=None),),
    }
    blocks["one value"] = {"norm": "batch"}
    block = random_block(**blocks.get(name, {}))
    if name == "another norm":
        block.norm = nn.GroupNorm(2, 6, dtype=torch.float64)
    if name == "sharded parameters":
        distribute_module(block, mesh, lambda _, layer, mesh: shard(layer, mesh))
    if name == "synchronised with others":
        group = [distributed.new_group([2 * half, 2 * half + 1]) for half in range(2)][rank // 2]
        block = nn.SyncBatchNorm.convert_sync_batchnorm(block, group)
    try:
        if name == "attention":
            block.attention(cut(2, 6, 8, dim=2))
        elif name == "axis":
            parallelize_module(block, mesh, PositionParallel(axis=2))(random(2, 6, 8, 4))
        elif name == "no block":
            parallelize_module(nn.Linear(6, 6), mesh, PositionParallel())
        else:
            block(*inputs.get(name, (cut(2, 6, 8, dim=2),)))
    except (TypeError, ValueError) as error:
        return type(error).__name__, str(error)
    return None


def shard(layer, mesh):
    """Cut the parameters of one layer."""
    for name, parameter in list(layer.named_parameters(recurse=False)):
        layer.register_parameter(name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))


def _pieces(rank, count, *arrays):
    return [a.chunk(count, 2)[rank] for a in arrays]


def _largest_difference(one, other):
    pairs = zip(one, other, strict=True)
    return max((whole(a).detach() - whole(b).detach()).abs().max().item() for a, b in pairs)


def style(rank):
    """Return how far blocks that PyTorch parallelises are from one on the whole input, which all compute."""
    x, dz, mask = random(*SHAPE, seed=1), random(*SHAPE, seed=2), random(4, 1, 8, 5, seed=3)[:, 0] > 0
    mesh, found = mesh_of((4,)), {}
    for data_format in ("channels_first", "channels_last"):
        options = {"pairwise": "embedded_gaussian", "norm": "batch", "data_format": data_format}
        block = parallelize_module(random_block(**options), mesh, PositionParallel())
        alone, last = random_block(**options), data_format == "channels_last"
        (a, b) = (one.movedim(1, -1) if last else one for one in (x, dz))
        here = [one.chunk(4, 1 if last else 2)[rank] for one in (a, b)]
        z, expected = block(here[0], key_mask=mask.chunk(4, 1)[rank]), alone(a, mask)
        z.backward(here[1])
        expected.backward(b)
        gradients = ([p.grad for p in one.parameters()] for one in (block, alone))
        found[data_format] = (
            type(z) is torch.Tensor,
            _largest_difference([z], [expected.chunk(4, 1 if last else 2)[rank]]),
            _largest_difference(*gradients),
            _largest_difference(block.buffers(), alone.buffers()),
            list(block.state_dict()) == list(alone.state_dict()),
        )
        rows = (one.attention(a, [0, 9]) for one in (block, alone))
        found[f"attention {data_format}"] = _largest_difference([next(rows)], [next(rows)])
    block = parallelize_module(random_block(), mesh, PositionParallel(use_local_output=False))
    z = block(distribute_tensor(x, mesh, [Replicate()]))
    found["DTensor"] = z.placements == (Shard(2),), _largest_difference([z], [random_block()(x)])
    return found


def training(rank):
    """Return how far three steps of AdamW with clipped gradients are from those on the whole input."""
    x, dz, mesh = random(*SHAPE, seed=1), random(*SHAPE, seed=2), mesh_of((4,))
    options = {"pairwise": "dot_product", "norm": "affine", "residual": False}
    blocks = parallelize_module(random_block(**options), mesh, PositionParallel()), random_block(**options)
    optimizers = [torch.optim.AdamW(block.parameters(), lr=0.01) for block in blocks]
    norms = []
    for _ in range(3):
        given = _pieces(rank, 4, x, dz), (x, dz)
        for block, optimizer, (a, d) in zip(blocks, optimizers, given, strict=True):
            optimizer.zero_grad()
            block(a).backward(d)
            norms.append(whole(nn.utils.clip_grad_norm_(block.parameters(), 1.0)))
            optimizer.step()
    return _largest_difference(norms[::2], norms[1::2]), _largest_difference(*(b.parameters() for b in blocks))


def with_fsdp(_, kind):
    """Return how far z and the gradients of a block that FSDP shards are from those on the whole input."""
    x, dz, mesh = random(*SHAPE, seed=1), random(*SHAPE, seed=2), mesh_of((2, 2))
    block, alone = random_block(norm="batch"), random_block(norm="batch")
    expected = alone(x)
    expected.backward(dz)
    places = [Shard(0), Shard(2)]
    if kind == "another axis":
        parallelize_module(block, mesh["b"], PositionParallel(use_local_output=False))
        fully_shard(block, mesh=mesh["a"])
    else:
        mesh, places = mesh_of((4,)), [Shard(2)]
        if kind == "each layer":
            for layer in block.children():
                fully_shard(layer, mesh=mesh)
        fully_shard(block, mesh=mesh)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a view, says PyTorch
        z = block(distribute_tensor(x, mesh, places))
        z.backward(distribute_tensor(dz, mesh, places))
    # FSDP takes the mean over its axis of what is a sum over the pieces.
    count = 2 if kind == "another axis" else 4
    gradients = [count * whole(p.grad) for p in block.parameters()], [p.grad for p in alone.parameters()]
    return _largest_difference([z], [expected]), _largest_difference(*gradients)


def compiled(rank, pairwise):
    """Return how far a block compiled as one graph is from one on the whole input."""
    x, dz, mesh = random(*SHAPE, seed=1), random(*SHAPE, seed=2), mesh_of((4,))
    torch.compiler.reset()
    block, alone = (random_block(pairwise=pairwise, norm="batch", subsample=2) for _ in range(2))
    parallelize_module(block, mesh, PositionParallel())
    here, grad = _pieces(rank, 4, x, dz)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the compiler's own imports
        z = torch.compile(block, fullgraph=True, backend="aot_eager")(here)
        z.backward(grad)
    expected = alone(x)
    expected.backward(dz)
    gradients = ([p.grad for p in one.parameters()] for one in (block, alone))
    return (
        _largest_difference([z], _pieces(rank, 4, expected)),
        _largest_difference(*gradients),
        _largest_difference(block.buffers(), alone.buffers()),
    )


def _replaced(name, make):
    """Return a patch of a method of the adapter by what `make` makes of it."""
    return mock.patch.object(adapter.Spread, name, make(getattr(adapter.Spread, name)))


def _local_count(method):
    """Divide the dot product by the keys that this device has."""

    def by_products(self, theta, phi, g, form, valid):
        return method(self, theta, phi, g, form, valid) * (self.whole.keys / self.here.keys)

    return by_products


def _unmasked(method):
    """Gather keys as if each of them were valid."""
    return lambda self, a: torch.ones_like(method(self, a)) if a.dtype == torch.uint8 else method(self, a)


def _local_mean(_):
    """Take the statistics of what is on this device."""
    return lambda _, a: a


def _without_count(method):
    """Sum everything but the number of positions."""

    def total(self, a):
        return torch.cat([method(self, a[:-1]), a[-1:]]) if a.numel() == 8 else method(self, a)

    return total


def _alone(_):
    """Attend within the shard."""
    return lambda _, *arguments: adapter.aggregate(*arguments)


def _no_share(a, mesh, axes):
    """Take this device's gradient of a sum for that of all."""
    summed = a.detach().clone()
    for axis in axes:
        distributed.all_reduce(summed, group=mesh.get_group(axis))
    return summed + a - a.detach()


def _replicated(_, a, **__):
    """Take this device's gradient of a parameter for that of all."""
    return a.to_local(grad_placements=[Replicate()] * a.device_mesh.ndim)


FAULTS = {
    "statistics of one device": lambda: _replaced("total", _local_mean),
    "positions of one device counted": lambda: _replaced("total", _without_count),
    "keys of one device counted": lambda: _replaced("_by_products", _local_count),
    "keys of one device": lambda: _replaced("aggregate", _alone),
    "a gather without its mask": lambda: _replaced("_gather", _unmasked),
    "no share in the gradient of a sum": lambda: mock.patch.object(adapter, "_total", _no_share),
    "no share in the gradient of a parameter": lambda: mock.patch.object(adapter, "_own", _replicated),
    "windows across borders": lambda: mock.patch.object(adapter, "check_pieces"),
    "the biased variance": lambda: mock.patch.object(norms, "_unbiased", lambda variance, _: variance),
}


def faulty(rank, fault, *arguments, **options):
    """Return what `sharded` does, of an adapter with a fault."""
    with FAULTS[fault]():
        return sharded(rank, *arguments, **options)
