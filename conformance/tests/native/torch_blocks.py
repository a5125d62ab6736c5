"""What tests of PyTorch share: random tensors, blocks with random parameters, and work in two processes."""

import os
import sys

import torch
from torch import distributed

from nonlocal_torch import NonLocalBlock


def random(*shape, seed=0, dtype=torch.float64):
    """Return a normal tensor that the seed decides."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_block(dtype=torch.float64, **options):
    """Return a block with random parameters and statistics, and biases that are larger than the weights."""
    block = NonLocalBlock(6, dtype=dtype, **options)
    with torch.no_grad():
        for seed, tensor in enumerate((*block.parameters(), *block.buffers())):
            if tensor.is_floating_point():
                tensor.copy_(random(*tensor.shape, seed=seed).abs() / 2 + 0.1)
    return block


def in_two_processes(work, folder):
    """Save what `work(rank)` returns in this process and in a copy of it, which are a group of gloo; then end both."""
    torch.set_num_threads(1)
    second = os.fork()  # before any thread: both share the imports
    rank = int(second == 0)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save(work(rank), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()
    if second:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(second, 0)[1]))
