"""Blocks whose statistics or parameters are spread over two processes."""

import subprocess
import sys

import torch
from torch import distributed, nn
from torch_blocks import in_two_processes, random, random_block

# What is slow to import is imported where it is used: the processes at the end run this file too.

SHAPE = (4, 6, 5, 7)
MASKS = {
    "no mask": None,
    "some": torch.rand(4, 5, 7, generator=torch.Generator().manual_seed(1)) > 0.4,
    "one process has none": torch.arange(4).reshape(4, 1, 1).expand(4, 5, 7) < 2,
    "none": torch.zeros(4, 5, 7, dtype=torch.bool),
}


def step(block, x, mask):
    """Return the gradients and the statistics after a step of training."""
    block(x, mask).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in block.named_parameters()}
    return gradients, dict(block.named_buffers())


def spread(rank):
    """Return a step of training on half of the batch in one of two processes, and a block sharded over both."""
    results, x = {}, random(*SHAPE, seed=3).chunk(2)[rank]
    for name, mask in MASKS.items():
        block = nn.SyncBatchNorm.convert_sync_batchnorm(random_block(norm="batch"))
        gradients, statistics = step(block, x, None if mask is None else mask.chunk(2)[rank])
        for gradient in gradients.values():
            distributed.all_reduce(gradient)
        results[name] = gradients, statistics
    results["sharded"] = sharded(x)
    return results


def sharded(x):
    """Return what a block gives whose layers are sharded one by one, and what it exports, before and after a write."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    block, mesh = random_block(pairwise="concatenation", norm="affine"), init_device_mesh("cpu", (2,))
    for layer in block.children():
        fully_shard(layer, mesh=mesh)
    fully_shard(block, mesh=mesh)
    z = block(x)
    z.square().sum().backward()
    exported = block.export_params()
    block.import_params({name: 2 * a for name, a in exported.items()})
    again = block.export_params()
    return [{name: torch.from_numpy(a) for name, a in params.items()} for params in (exported, again)] + [z.detach()]


def test_two_processes_are_as_one_on_the_whole_batch(tmp_path):
    subprocess.run([sys.executable, __file__, str(tmp_path)], check=True, timeout=240)
    block, x = random_block(pairwise="concatenation", norm="affine"), random(*SHAPE, seed=3)
    params = {name: torch.from_numpy(a) for name, a in block.export_params().items()}
    expected = {name: step(random_block(norm="batch"), x, mask) for name, mask in MASKS.items()}
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        once, twice, z = found.pop("sharded")
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close((once, twice), (params, {name: 2 * a for name, a in params.items()}), rtol=0, atol=0)
        torch.testing.assert_close(z, block(x).detach().chunk(2)[rank], rtol=1e-12, atol=1e-12)


if __name__ == "__main__":
    in_two_processes(spread, sys.argv[1])
