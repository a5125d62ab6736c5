"""What a GPU alone shows of PyTorch: kernels, their memory, graphs that are played again, and waiting for values."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch_blocks import random, random_block

from nonlocal_torch import NonLocalBlock, nonlocal_op

if not torch.cuda.is_available():
    pytest.skip("needs a GPU that PyTorch sees", allow_module_level=True)

EXACT = {
    "gaussian": "streamed",
    "embedded_gaussian": "streamed",
    "dot_product": "reassociated",
    "concatenation": "sorted",
}
KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
every_form = pytest.mark.parametrize("pairwise", EXACT)


def operands(queries, keys, width, dtype):
    shapes = [(2, queries, width), (2, keys, width), (2, keys, width)]
    return [random(*shape, seed=seed).to("cuda", dtype).requires_grad_() for seed, shape in enumerate(shapes)]


@every_form
@pytest.mark.parametrize("method", ["exact", "pairwise"])
@pytest.mark.parametrize("is_mixed", [False, True])
def test_a_graph_that_is_played_again_gives_the_numbers_of_single_calls(pairwise, method, is_mixed):
    name = EXACT[pairwise] if method == "exact" else method
    block = random_block(torch.float32, pairwise=pairwise, norm="batch", subsample=2, method=name).cuda()
    inputs = [random(2, 6, 16, 18, seed=seed, dtype=torch.float32).cuda().requires_grad_() for seed in range(4)]

    def step(compute, x):
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast("cuda", torch.bfloat16, is_mixed):
            z = compute(x)
        gradients = torch.autograd.grad(z.square().sum(), [x, *block.parameters()])
        return [a.detach().clone() for a in (z, *gradients)]

    torch.compiler.reset()
    compiled = torch.compile(block, mode="reduce-overhead", fullgraph=True)
    for x in inputs:
        for a, b in zip(step(compiled, x), step(block, x), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=(0.05 if is_mixed else 1e-4) * b.abs().max().item())


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_training_step_needs_less_than_an_eighth_of_the_matrix(pairwise, dtype):
    block = NonLocalBlock(32, pairwise=pairwise, device="cuda", dtype=dtype)
    x = torch.randn(1, 32, 128, 128, device="cuda", dtype=dtype, requires_grad=True)
    block(x).sum().backward()  # what libraries allocate once
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    block(x).sum().backward()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < dtype.itemsize * 128**4 / 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1, 12, 100, 131, 256])
@pytest.mark.parametrize("is_masked", [False, True])
def test_fused_attention_runs_on_a_kernel_without_the_matrix(dtype, width, is_masked):
    arrays = operands(200, 77, width, dtype)
    key_mask = (random(2, 77) > 0).cuda() if is_masked else None
    with sdpa_kernel(KERNELS):  # without any that takes the operands this is an error
        y = nonlocal_op(*arrays, key_mask=key_mask, method="streamed")
        torch.autograd.grad(y, arrays, torch.ones_like(y))


@every_form
@pytest.mark.parametrize("method", ["exact", "pairwise"])
@pytest.mark.parametrize("width", [12, 300])
def test_no_method_waits_for_a_value(pairwise, method, width):
    name = EXACT[pairwise] if method == "exact" else method
    arrays, key_mask = operands(200, 77, width, torch.bfloat16), (random(2, 77) > 0).cuda()
    concat = {"concat_weight": random(2 * width).cuda()} if pairwise == "concatenation" else {}
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = nonlocal_op(*arrays, pairwise, key_mask=key_mask, method=name, **concat)
        torch.autograd.grad(y, arrays, torch.ones_like(y))
    finally:
        torch.cuda.set_sync_debug_mode("default")
