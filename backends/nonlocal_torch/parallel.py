"""Blocks whose positions are cut over several devices, for PyTorch's `parallelize_module`."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_module
from torch.distributed.tensor.parallel import ParallelStyle

from nonlocal_core.arguments import check_bool, check_int
from nonlocal_core.errors import fail_type, fail_value
from nonlocal_torch.block import FORMATS, NonLocalBlock

__all__ = ["PositionParallel"]


class PositionParallel(ParallelStyle):
    """Cut the positions of a block over the devices of a mesh, along one spatial axis.

    The parameters become replicated DTensors with the values of the first device, and keep their names in the state
    dict. A plain `x` or `key_mask` is taken for the part of this device, and all parts for equally large; a DTensor
    on the mesh is redistributed to be cut along the axis, and one on another mesh is taken as it is. z is that of the
    whole input, and so are the statistics of batch normalisation.

    Args:
        axis: the spatial axis along which positions are cut, from 0.
        use_local_output: return this device's part of z as a plain tensor, rather than z as a DTensor.

    Raises:
        TypeError: if an argument has a wrong type, or the module is no `NonLocalBlock`.
        ValueError: if `axis` is negative.

    Example:
        >>> PositionParallel(axis=1)  # for torch.distributed.tensor.parallel.parallelize_module(block, mesh, ..)
        PositionParallel(axis=1, use_local_output=True)
    """

    def __init__(self, axis: int = 0, *, use_local_output: bool = True) -> None:
        """Take the axis; see the class for the arguments."""
        super().__init__()
        self.axis = check_int("axis", axis, "be an int of at least 0", least=0)
        self.use_local_output = check_bool("use_local_output", use_local_output)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, NonLocalBlock):
            raise fail_type("module", "be a NonLocalBlock for PositionParallel", module)
        distribute_module(module, device_mesh)
        module.register_forward_pre_hook(partial(self._enter, device_mesh), with_kwargs=True)
        if self.use_local_output:
            module.register_forward_hook(lambda _, __, z: z.to_local())
        return module

    def _enter(self, mesh: DeviceMesh, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = dict(zip(("x", "key_mask"), args, strict=False)) | kwargs
        for name, channels in (("x", FORMATS.index(block.data_format)), ("key_mask", None)):
            if isinstance(a := given.get(name), Tensor):
                dims = range(2 - (channels != 0), a.dim() - (channels == 1))
                if self.axis >= len(dims):
                    raise fail_value("axis", f"be one of the {len(dims)} spatial axes of `{name}`", self.axis)
                given[name] = _cut(a, mesh, dims[self.axis])
        return (), given

    def __repr__(self) -> str:
        """Show the arguments."""
        return f"{type(self).__name__}(axis={self.axis}, use_local_output={self.use_local_output})"


def _cut(a: Tensor, mesh: DeviceMesh, dim: int) -> DTensor:
    places = [Shard(dim)] * mesh.ndim
    if not isinstance(a, DTensor):
        return DTensor.from_local(a, mesh, places, run_check=False)
    return a.redistribute(placements=places) if a.device_mesh == mesh else a
