"""What PyTorch does where a GPU is planned, seen without one: on a CPU taken for it, and on tensors without data."""

import numpy as np
import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch_blocks import random

import nonlocal_core as nlc
from nonlocal_conformance.drivers.torch import TorchDriver
from nonlocal_conformance.registry import bind
from nonlocal_core import planning
from nonlocal_torch import NonLocalBlock, context, nonlocal_op
from nonlocal_torch.methods.streamed import fused_attention

HALVES = ("bfloat16", "float16")
UNITS = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}
EXACT = {"embedded_gaussian": "streamed", "dot_product": "reassociated", "concatenation": "sorted"}
MASK = torch.tensor([[True, False] * 8, [False] * 16])
BOUND = {one.id: one for one in bind(TorchDriver())}
WIDTHS = {"fused": 12, "matrix": 300, "chunks": 300}
"""A width with which each way is planned for the softmax forms in half precision."""

quiet = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
every_half = pytest.mark.parametrize("dtype", HALVES)
every_way = pytest.mark.parametrize("way", WIDTHS)


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    monkeypatch.setitem(context.KINDS, "cpu", "gpu")


@pytest.fixture(autouse=True)
def _few_are_many(monkeypatch, request):
    """Let the matrix be taken for few weights, unless it is asked for."""
    if "way" in request.fixturenames and request.getfixturevalue("way") == "chunks":
        monkeypatch.setattr(planning, "WIDE", 8)


def operands(width, dtype, *, queries=24):
    """Return theta, phi and g that require a gradient, of a size of scores that half precision bears."""
    shapes = [(2, queries, width), (2, 16, width), (2, 16, width)]
    arrays = [random(*shape, seed=seed) / width**0.25 for seed, shape in enumerate(shapes)]
    return [a.to(getattr(torch, dtype)).requires_grad_() for a in arrays]


def options_of(pairwise, width, key_mask):
    concat = {"concat_weight": random(2 * width, seed=5) / width} if pairwise == "concatenation" else {}
    return {"pairwise": pairwise, "key_mask": key_mask, "scale": -0.7, **concat}


# Numbers


@pytest.mark.parametrize(
    "name",
    [
        "mixed_gradients-embedded_gaussian_batch_norm-float64",
        "mixed_gradients-dot_product_batch_norm-float64",
        "large_scores-embedded_gaussian_1d-float64",
        "large_scores-dot_product_1d-float64",
        "score_digits-embedded_gaussian_1d-float64",
    ],
)
def test_the_checks_of_half_precision_pass_by_the_matrix_and_by_chunks(name, monkeypatch):
    monkeypatch.setitem(planning.FUSED, ("torch", "gpu"), {})
    BOUND[name]()


@pytest.mark.parametrize("pairwise", EXACT)
@pytest.mark.parametrize("width", [12, 131, 300])
@pytest.mark.parametrize("dtype", UNITS)
@pytest.mark.parametrize("key_mask", [None, MASK], ids=["all keys", "some keys, or none"])
@pytest.mark.parametrize("is_large", [False, True])
def test_a_planned_gpu_gives_the_numbers_of_the_reference(pairwise, width, dtype, key_mask, is_large, monkeypatch):
    if is_large:
        monkeypatch.setattr(planning, "WIDE", 8)
    arrays, options = operands(width, dtype), options_of(pairwise, width, key_mask)
    dy = random(2, 24, width, seed=9).to(arrays[0].dtype)
    y = nonlocal_op(*arrays, **options)
    found = [y.detach(), *torch.autograd.grad(y, arrays, dy)]
    given = [a.detach().double().numpy() for a in (*arrays, dy)]
    named = {name: a.numpy() if isinstance(a, torch.Tensor) else a for name, a in options.items()}
    gradients = nlc.nonlocal_op_vjp(*given, **named)
    expected = [nlc.nonlocal_op(*given[:3], **named), *(gradients[name] for name in ("theta", "phi", "g"))]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.double().numpy(), b, rtol=0, atol=8 * UNITS[dtype] * np.abs(b).max())


@every_half
@pytest.mark.parametrize(
    ("pairwise", "way"), [*(("embedded_gaussian", way) for way in WIDTHS), ("dot_product", "fused")]
)
def test_second_derivatives_are_those_of_a_cpu(pairwise, way, dtype, monkeypatch):
    arrays = operands(WIDTHS[way], dtype)

    def second():
        y = nonlocal_op(*arrays, pairwise, key_mask=MASK)
        first = torch.autograd.grad(y.float().sin().sum(), arrays, create_graph=True)
        total = torch.stack([a.float().square().sum() for a in first]).sum()
        return [a.float() for a in torch.autograd.grad(total, arrays)]

    found = second()
    monkeypatch.setitem(context.KINDS, "cpu", "cpu")
    for a, b in zip(found, second(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=16 * UNITS[dtype] * b.abs().max().item())


@every_way
@pytest.mark.parametrize("pairwise", ["embedded_gaussian", "dot_product"])
def test_transforms_of_functions_take_half_precision(pairwise, way):
    arrays = [a.detach() for a in operands(WIDTHS[way], "bfloat16")]

    def of_sample(*sample):
        return nonlocal_op(*(a[None] for a in sample), pairwise).float().square().sum()

    each = torch.func.vmap(torch.func.grad(of_sample, argnums=(0, 1, 2)))(*arrays)
    leaves = [a.requires_grad_() for a in arrays]
    whole = torch.autograd.grad(nonlocal_op(*leaves, pairwise).float().square().sum(), leaves)
    for a, b in zip(each, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=8 * UNITS["bfloat16"] * b.abs().max().item())


@pytest.mark.parametrize("method", ["pairwise", "reassociated", "streamed"])
def test_large_float16_numbers_leave_no_range(method):
    pairwise = "dot_product" if method == "reassociated" else "embedded_gaussian"
    theta, phi, g = (a.detach() for a in operands(300, "float16"))
    phi, g = (4000 * phi).requires_grad_(), (1000 * g).requires_grad_()  # their products are beyond 65504
    y = nonlocal_op(theta, phi, g, pairwise, method=method, scale=1e-3)
    gradients = torch.autograd.grad(y, (phi, g), torch.full_like(y, 1e-3))
    assert all(a.isfinite().all() for a in (y, *gradients))
    assert all(a.any() for a in gradients)


# The choice


class Operations(TorchDispatchMode):
    """Notes the operations of a call, and the results that are no views."""

    def __init__(self):
        super().__init__()
        self.names, self.results = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **({} if kwargs is None else kwargs))
        self.names.append(func.overloadpacket.__name__)
        if not func.is_view:
            self.results += [(a.dtype, a.numel()) for a in tree_leaves(result) if isinstance(a, torch.Tensor)]
        return result


def way_of(names):
    """Return by which way the softmax forms were computed."""
    if any("attention" in name for name in names):
        return "fused"
    return {1: "matrix", 9: "chunks"}[sum(name == "_softmax" for name in names)]  # of 20 queries, 2 at a time


@quiet
@every_way
@pytest.mark.parametrize(("dtype", "is_trained"), [("bfloat16", True), ("float32", False)])
def test_a_compiler_takes_the_way_that_is_taken_without_one(way, is_trained, dtype):
    arrays, names = operands(WIDTHS[way], dtype, queries=18), []
    given = arrays if is_trained else [a.detach() for a in arrays]
    with Operations() as seen:
        y = nonlocal_op(*given)
    assert way_of(seen.names) == way

    def note(graph, _):
        names.extend(
            node.target.overloadpacket.__name__
            for node in graph.graph.nodes
            if node.op == "call_function" and hasattr(node.target, "overloadpacket")
        )
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(
        nonlocal_op, fullgraph=True, backend=aot_autograd(fw_compiler=note, bw_compiler=lambda graph, _: graph.forward)
    )
    torch.testing.assert_close(compiled(*given), y, rtol=0.02, atol=0.02)
    assert way_of(names) == way


# What a kernel is given


@pytest.mark.parametrize("dtype", ["float32", *HALVES])
@pytest.mark.parametrize("width", [1, 12, 131, 250])
@pytest.mark.parametrize("layout", ["whole", "parts", "shifted", "transposed"])
def test_fused_attention_gets_rows_that_begin_where_its_kernels_want_them(dtype, width, layout, monkeypatch):
    seen = []
    original = functional.scaled_dot_product_attention
    monkeypatch.setattr(
        functional, "scaled_dot_product_attention", lambda *a, **k: seen.append((a, k)) or original(*a, **k)
    )
    kind, mask = getattr(torch, dtype), random(16, 2).T > 0
    long = random(2, 16, 3 * width + 1).to(kind) / width**0.25
    laid_out = {
        "whole": [long[..., :width].contiguous()] * 3,
        "parts": list(long[..., :-1].split(width, dim=-1)),
        "shifted": [long[..., 1 : width + 1]] * 3,
        "transposed": [long[..., :width].mT.contiguous().mT] * 3,
    }[layout]
    y = fused_attention(*laid_out, mask, 1.0)
    ((arrays, named),) = seen
    unit = 16 // kind.itemsize
    for a in arrays:
        assert a.shape[-1] % unit == 0
        assert a.stride(-1) == 1
        assert not [step for step in (a.storage_offset(), *a.stride()[:-1]) if step % unit]
    assert named["attn_mask"].shape == (2, 1, 1, 16)
    assert named["attn_mask"].stride(-1) == 1
    monkeypatch.setitem(context.KINDS, "cpu", "cpu")
    expected = fused_attention(*laid_out, mask, 1.0)
    torch.testing.assert_close(y, expected, rtol=0, atol=8 * UNITS[dtype] * expected.abs().max().item())


# Tensors without data, of which no value can be read


def on_meta(pairwise, width, dtype, method="auto", *, queries=64, keys=48):
    """Return the operation as a function, and its operands."""
    arrays = [
        torch.empty(2, size, width, dtype=dtype, device="meta").requires_grad_() for size in (queries, keys, keys)
    ]
    options = options_of(pairwise, width, torch.empty(2, keys, dtype=torch.bool, device="meta"))
    named = {name: a.to("meta") if isinstance(a, torch.Tensor) else a for name, a in options.items()}
    return lambda *given: nonlocal_op(*given, **named, method=method), arrays


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("pairwise", "method"), [(form, name) for form, exact in EXACT.items() for name in (exact, "pairwise")]
)
@pytest.mark.parametrize("width", [12, 300])
def test_no_method_reads_a_value_back(pairwise, method, width, dtype):
    compute, arrays = on_meta(pairwise, width, dtype, method)
    y = compute(*arrays)
    assert [a.shape for a in torch.autograd.grad(y, arrays, torch.empty_like(y))] == [a.shape for a in arrays]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pairwise", EXACT)
def test_a_block_in_training_reads_no_value_back(pairwise, dtype):
    block = NonLocalBlock(12, pairwise=pairwise, subsample=2, norm="batch", device="meta", dtype=dtype)
    x = torch.empty(2, 12, 6, 8, device="meta", dtype=dtype)
    block(x, torch.empty(2, 6, 8, dtype=torch.bool, device="meta")).backward(torch.empty_like(x))
    assert all(p.grad is not None for p in block.parameters())


@pytest.mark.parametrize(
    "read", [lambda s: s * s.sum().item(), lambda s: s[s > 0].sum() * s, lambda s: s if s.any() else 2 * s]
)
def test_a_value_that_is_read_back_is_found(read):
    arrays = [torch.empty(2, 5, 4, device="meta")] * 3
    with pytest.raises((RuntimeError, NotImplementedError), match=r"meta|unimplemented"):
        nonlocal_op(*arrays, pairwise=lambda theta, phi: read(theta @ phi.mT), normalize="count")


def test_a_dot_product_makes_no_float32_copy_of_an_operand():
    compute, arrays = on_meta("dot_product", 64, torch.bfloat16, queries=700, keys=600)
    with Operations() as seen:
        y = compute(*arrays)
        torch.autograd.grad(y, arrays, torch.empty_like(y))
    assert max(size for kind, size in seen.results if kind == torch.float32) <= 2 * 64 * 64


@every_half
def test_a_chunk_of_queries_is_an_eighth_of_the_matrix_at_most(dtype):
    compute, arrays = on_meta("embedded_gaussian", 300, getattr(torch, dtype), "streamed", queries=6000, keys=5000)
    with Operations() as seen:
        y = compute(*arrays)
        torch.autograd.grad(y, arrays, torch.empty_like(y))
    assert 0 < max(size for _, size in seen.results) <= 2 * 6000 * 5000 / 8


@every_half
def test_a_weight_is_kept_in_two_bytes(dtype):
    kept = []
    compute, arrays = on_meta("embedded_gaussian", 300, getattr(torch, dtype), queries=600, keys=500)
    with saved_tensors_hooks(lambda a: kept.append(a) or a, lambda a: a):
        compute(*arrays)
    assert [a.dtype.itemsize for a in kept if a.numel() == 2 * 600 * 500] == [2]
