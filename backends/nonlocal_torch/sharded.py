"""The block on a DTensor: every device keeps its positions, and the devices share keys, products and statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn.utils.stateless import _reparametrize_module

from nonlocal_core.errors import fail_type, fail_value
from nonlocal_core.geometry import Sets
from nonlocal_core.planning import sends_products
from nonlocal_core.spec import NonLocalSpec
from nonlocal_core.spec.cuts import check_pieces, inner_axis
from nonlocal_core.spec.form import Form
from nonlocal_torch.context import full_precision, widened
from nonlocal_torch.layers import Scale
from nonlocal_torch.methods.pairwise import concat_summands
from nonlocal_torch.methods.products import multiply
from nonlocal_torch.op import aggregate

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

__all__ = ["Spread", "call_spread", "call_with", "is_spread", "sum_over"]

_OWN_NORMS = (nn.BatchNorm1d.forward, nn.SyncBatchNorm.forward, Scale.forward)


def is_spread(*tensors: Any) -> bool:
    """Return whether any of these is a DTensor."""
    if not distributed.is_available() or all(a is None or type(a) in (Tensor, nn.Parameter) for a in tensors):
        return False
    from torch.distributed.tensor import DTensor  # where there is one, it is imported

    return any(isinstance(a, DTensor) for a in tensors)


@dataclasses.dataclass(frozen=True)
class Spread:
    """What the devices of a mesh hold of one input.

    Args:
        mesh: the devices.
        cutting: the axes of the mesh that cut the input.
        gathered: those along which the keys of one set are apart, each with the axis of the set that it cuts.
        here: the sets of the positions on this device.
        whole: the sets of all positions.
    """

    mesh: DeviceMesh
    cutting: tuple[int, ...]
    gathered: dict[int, int]
    here: Sets
    whole: Sets

    def total(self, a: Tensor) -> Tensor:
        """Return the sum over all devices that hold other positions or samples."""
        return _total(a, self.mesh, self.cutting)

    def aggregate(self, theta: Tensor, phi: Tensor, g: Tensor, form: Form, valid: Tensor | None, method: str) -> Tensor:
        """Compute the operation for the queries of this device and the keys of all.

        What is sent follows from the sizes of the whole alone, so that all devices do the same.
        """
        if not self.gathered:
            return aggregate(theta, phi, g, form, valid, method)
        dtype, inner, width = theta.dtype, phi.shape[2], g.shape[2]
        if form.pairwise == "dot_product" and method != "pairwise" and sends_products(self.whole.keys, inner, width):
            return self._by_products(theta, phi, g, form, valid)
        if form.pairwise == "concatenation":  # of a key one number is asked
            with full_precision(theta.device.type):
                theta, phi = concat_summands(widened(theta), widened(phi), form)
            form = dataclasses.replace(form, concat_weight=theta.new_ones(1, 2), concat_bias=None)
        phi, g = self._gather(phi), self._gather(g)
        valid = None if valid is None else self._gather(valid[..., None].to(torch.uint8))[..., 0] > 0
        return aggregate(theta, phi, g, form, valid, method).to(dtype)

    def _by_products(self, theta: Tensor, phi: Tensor, g: Tensor, form: Form, valid: Tensor | None) -> Tensor:
        """Return theta (phi^T g) / M, of which the C' x D sums over keys are all that is sent."""
        sums, count = partial(_total, mesh=self.mesh, axes=tuple(self.gathered)), cast("Any", self.whole.keys)
        with full_precision(theta.device.type):
            if valid is not None:
                phi, g = (a.masked_fill(~valid[..., None], 0) for a in (phi, g))
                count = sums(valid.sum(dim=1)).clamp(min=1)[:, None, None].to(widened(g).dtype)
            products = sums(multiply(phi.transpose(1, 2), g, torch.promote_types(g.dtype, torch.float32)))
            return multiply(theta, form.scale * products / count, theta.dtype)

    def _gather(self, a: Tensor) -> Tensor:
        """Return what all devices hold of the keys of a set, `(B', M here, C)` -> `(B', M, C)`."""
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

        # On their grid keys are cut as positions are. Along the other axes of the mesh each device keeps what it has.
        a = a.reshape(a.shape[0], *self.here.key_sizes, a.shape[-1]).contiguous()
        shape = torch.Size((a.shape[0], *self.whole.key_sizes, a.shape[-1]))
        axes = range(self.mesh.ndim)
        cut = [Shard(1 + self.gathered[axis]) if axis in self.gathered else Replicate() for axis in axes]
        spread = DTensor.from_local(
            a, self.mesh, cut, run_check=False, shape=shape, stride=torch.empty(shape, device="meta").stride()
        )
        shares = [Partial() if axis in self.gathered else Replicate() for axis in axes]
        every = spread.redistribute(placements=[Replicate() for _ in axes])
        return every.to_local(grad_placements=shares).flatten(1, -2)


def _total(a: Tensor, mesh: DeviceMesh, axes: Sequence[int]) -> Tensor:
    """Return the sum over the devices along some axes of a mesh; gradients of any order find their way back."""
    if torch.compiler.is_compiling():  # a function with a group of processes does not compile
        from torch.distributed.tensor import DTensor, Partial, Replicate

        shares = [Partial() if axis in axes else Replicate() for axis in range(mesh.ndim)]
        spread = DTensor.from_local(a, mesh, shares, run_check=False)
        return spread.redistribute(placements=[Replicate()] * mesh.ndim).to_local(grad_placements=shares)
    # The other way round: the second derivative of what DTensor does here is wrong.
    for axis in axes:
        a = sum_over(a, mesh.get_group(axis))
    return a


class _SumOver(torch.autograd.Function):
    """The sum over a group of processes, which is its own gradient: each process has a share of the result's."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        a = a.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(a, group=group)
        return a

    @staticmethod
    def backward(ctx: Any, da: Tensor) -> tuple[Tensor, None]:
        return sum_over(da, ctx.group), None


sum_over: Callable[[Tensor, ProcessGroup | None], Tensor] = _SumOver.apply


def call_spread(block: nn.Module, spec: NonLocalSpec, call: Callable[..., Tensor], x: Tensor, key_mask: Any) -> Tensor:
    """Return what `call(x, key_mask, spread)` makes of what this device holds, as a DTensor like `x`.

    Args:
        block: the block whose parameters it reads.
        spec: what the block computes.
        call: a method of the block.
        x: `(B, C, S1..Sk)`, which fits the spec.
        key_mask: `(B, S1..Sk)`, or None.
    """
    from torch.distributed.tensor import DTensor

    spread = _spread_of(spec, x, key_mask)
    _check_norm(getattr(block, "norm", None), spread)
    given = cast("DTensor", x)
    mask = None if key_mask is None else key_mask.to_local()
    z = call_with(partial(_own, spread=spread), block, call, given.to_local(), mask, spread)
    return DTensor.from_local(z, given.device_mesh, given.placements, run_check=False, shape=x.shape, stride=x.stride())


def call_with(
    own: Callable[[str, Any], Tensor], block: nn.Module, call: Callable[..., Tensor], *arguments: Any
) -> Tensor:
    """Return what a method of a block gives where `own(name, a)` stands for each parameter that is a DTensor.

    A layer that FSDP shards by itself is left to FSDP, which brings its parameters together when it is called.
    """
    tensors = chain(block.named_parameters(), block.named_buffers())
    spread = {name: a for name, a in tensors if is_spread(a)}
    if spread:
        from torch.distributed.fsdp import FSDPModule

        alone = [f"{name}." for name, layer in block.named_modules() if name and isinstance(layer, FSDPModule)]
        spread = {name: a for name, a in spread.items() if not name.startswith(tuple(alone))}
    if not spread:
        return call(*arguments)
    with _reparametrize_module(block, {name: own(name, a) for name, a in spread.items()}):
        return call(*arguments)


def _spread_of(spec: NonLocalSpec, x: Tensor, key_mask: Any) -> Spread:
    """Check how an input and its mask are cut; of the whole alone, so that every device raises the same."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    for name, a in (("x", x), ("key_mask", key_mask)):
        if a is not None and not isinstance(a, DTensor):
            raise fail_type(name, "be a DTensor, as the other is: `x` and `key_mask` are cut alike", a)
    given = cast("DTensor", x)
    mesh, places = given.device_mesh, given.placements
    # A strided shard has a `split_factor`; a compiler does not know the types of placements.
    is_served = [
        p.is_replicate() or (p.is_shard() and not p.is_shard(1) and not hasattr(p, "split_factor")) for p in places
    ]
    if not all(is_served):
        raise fail_value("x", "be replicated, or cut along samples or positions, on each axis of its mesh", places)
    dims = [place.dim if isinstance(place, Shard) else None for place in places]
    if key_mask is not None:
        expected = tuple(Replicate() if dim is None else Shard(max(dim - 1, 0)) for dim in dims)
        if key_mask.device_mesh != mesh or key_mask.placements != expected:
            raise fail_value("key_mask", f"be cut as `x` is, {expected} on its mesh", key_mask.placements)
    whole = spec.sets(x.shape[2:])
    gathered: dict[int, int] = {}
    for axis, dim in enumerate(dims):
        if dim is not None and dim > 1:
            parts = [mesh.size(i) for i, other in enumerate(dims) if other == dim]
            check_pieces(spec, x.dim() - 2, dim - 2, list(_pieces(x.shape[dim], parts)))
            inner = inner_axis(spec, x.dim() - 2, dim - 2)
            if inner is not None:
                gathered[axis] = inner
    cutting = tuple(axis for axis, dim in enumerate(dims) if dim is not None)
    return Spread(mesh, cutting, gathered, spec.sets(given.to_local().shape[2:]), whole)


def _pieces(size: int, parts: Sequence[int]) -> Iterator[int]:
    """Yield into what sizes a DTensor cuts an axis over one axis of a mesh after the other."""
    if not parts:
        yield size
        return
    each = -(-size // parts[0])
    for part in range(parts[0]):
        yield from _pieces(min(each, max(0, size - part * each)), parts[1:])


def _check_norm(norm: nn.Module | None, spread: Spread) -> None:
    """Check that the statistics of a norm can be those of the whole input."""
    if norm is None or not spread.cutting:
        return
    if type(norm).forward not in _OWN_NORMS:
        raise fail_type("norm", "be the block's own, whose statistics are those of all devices, for a DTensor", norm)
    if isinstance(norm, nn.SyncBatchNorm):
        ranks = distributed.get_process_group_ranks(norm.process_group)
        if len(spread.cutting) < spread.mesh.ndim or not set(spread.mesh.mesh.flatten().tolist()) <= set(ranks):
            rule = "synchronise every process of the mesh of `x`, each of which must have a part of its own"
            raise fail_value("norm", rule, f"the processes {ranks} and the mesh {spread.mesh}")


def _own(name: str, a: Any, spread: Spread) -> Tensor:
    """Return a parameter as this device has it, whose gradient is this device's share of the whole."""
    from torch.distributed.tensor import Partial, Replicate

    mesh, names = a.device_mesh, spread.mesh.mesh_dim_names or ()
    if mesh == spread.mesh:
        shares = [axis in spread.cutting for axis in range(mesh.ndim)]
    else:
        cutting = [names[axis] for axis in spread.cutting if names]
        shares = [one in cutting for one in mesh.mesh_dim_names or ()]
    if not (all(place.is_replicate() for place in a.placements) and len(shares) == mesh.ndim and (names or shares)):
        rule = "be replicated over the mesh of `x`, or over axes of it that have names"
        raise fail_value(name, rule, f"{a.placements} on {mesh}")
    return a.to_local(grad_placements=[Partial() if share else Replicate() for share in shares])
