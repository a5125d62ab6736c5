"""What the methods without the matrix promise in PyTorch beyond the numbers: memory, derivatives, graphs, products."""

import weakref

import pytest
import torch
from torch._dynamo import config as dynamo
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch_blocks import random

from nonlocal_conformance.memory import peak_resident
from nonlocal_torch import NonLocalBlock, nonlocal_op
from nonlocal_torch.methods.sorted import running_sums
from nonlocal_torch.methods.streamed import streamed

EXACT = {
    "gaussian": "streamed",
    "embedded_gaussian": "streamed",
    "dot_product": "reassociated",
    "concatenation": "sorted",
}
SOME_MASKED = torch.tensor([[True, False, True, True], [False] * 4])

# PyTorch's own: it makes an instance of a function to trace it, and its forward mode imports what it deprecates.
quiet = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning", "ignore:.torch.jit.script. is:DeprecationWarning"
)
every_form = pytest.mark.parametrize("pairwise", EXACT)
every_mask = pytest.mark.parametrize("key_mask", [None, SOME_MASKED], ids=["all keys", "some keys, or none"])


def leaves(batch=2, queries=5, keys=4, inner=3, values=3, dtype=torch.float64):
    """Return theta, phi and g that require a gradient."""
    shapes = [(batch, queries, inner), (batch, keys, inner), (batch, keys, values)]
    return [random(*shape, dtype=dtype, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]


def operation(pairwise, key_mask=None, method=None, inner=3, dtype=torch.float64, scale=-0.7):
    """Return the operation as a function of theta, phi and g, by the method without the matrix unless one is named."""
    concat = {}
    if pairwise == "concatenation":
        concat = {
            "concat_weight": random(2 * inner, seed=5, dtype=dtype),
            "concat_bias": torch.tensor(0.3, dtype=dtype),
        }
    named = EXACT[pairwise] if method is None else method
    return lambda *arrays: nonlocal_op(
        *arrays, pairwise=pairwise, key_mask=key_mask, method=named, scale=scale, **concat
    )


def random_block(**options):
    block = NonLocalBlock(6, dtype=torch.float64, **options)
    with torch.no_grad():
        for seed, tensor in enumerate((*block.parameters(), *block.buffers())):
            if tensor.is_floating_point():
                tensor.copy_(random(*tensor.shape, seed=seed).abs() + 0.1)
    return block


class Names(TorchDispatchMode):
    """Notes which operations are called."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_the_sorted_method_wakes_no_threads_for_a_triangle_of_32_rows():
    with torch.no_grad(), Names() as names:
        nonlocal_op(*(random(1, 50, 4) for _ in range(3)), "concatenation", concat_weight=random(8), method="sorted")
    assert "sort" in names.seen
    assert not {"tril", "triu"} & names.seen  # which PyTorch runs in parallel whatever their size


class Work(TorchDispatchMode):
    """Notes how many elements each operation gives that is more than a view."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **({} if kwargs is None else kwargs))
        if not (func.is_view or "view" in func.name() or func.name() == "aten::promote_types"):
            self.sizes.append(sum(a.numel() for a in tree_leaves(result) if isinstance(a, torch.Tensor)))
        return result


def test_a_concatenation_wakes_the_other_threads_for_few_operations():
    block, x = NonLocalBlock(128, pairwise="concatenation").eval(), torch.zeros(1, 128, 28, 28)
    with torch.no_grad(), Work() as work:
        block(x)
    assert sum(size >= 2**15 for size in work.sizes) <= 11  # the size from which PyTorch divides an operation


@pytest.mark.parametrize(
    ("pairwise", "options", "most"),
    [
        ("embedded_gaussian", {}, 24),
        ("embedded_gaussian", {"norm": "batch", "subsample": 2}, 32),
        ("gaussian", {}, 26),
        ("dot_product", {}, 24),
        ("concatenation", {}, 49),
        ("concatenation", {"norm": "batch", "subsample": 2}, 55),
    ],
)
def test_a_small_training_step_has_few_operations(pairwise, options, most):
    block, x = NonLocalBlock(64, pairwise=pairwise, **options), torch.zeros(1, 64, 14, 14, requires_grad=True)
    with Work() as work:
        block(x).backward(torch.zeros_like(x))
    assert len(work.sizes) <= most


class LargestResult(TorchDispatchMode):
    """Keeps the largest number of elements that a step gave, those of the gradient included."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **({} if kwargs is None else kwargs))
        self.size = max(self.size, *(a.numel() for a in tree_leaves(result) if isinstance(a, torch.Tensor)), 0)
        return result


class Products(TorchFunctionMode):
    """Counts the products with a layer's weight."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func is functional.linear
        return func(*args, **({} if kwargs is None else kwargs))


# Derivatives


@every_form
@every_mask
def test_first_and_second_derivatives_pass_gradcheck(pairwise, key_mask):
    compute, arrays = operation(pairwise, key_mask, inner=2), leaves(queries=3, inner=2, values=2)
    assert torch.autograd.gradcheck(compute, arrays)
    assert torch.autograd.gradgradcheck(compute, arrays)


@pytest.mark.parametrize("rows", [1, 2, 3])
@every_mask
def test_blocks_of_queries_pass_gradcheck_and_gradgradcheck(rows, key_mask):
    theta, phi, g = leaves(queries=3, inner=2, values=2)
    if key_mask is not None:
        phi, g = (a.detach().masked_fill(~key_mask[..., None], 0).requires_grad_() for a in (phi, g))

    def compute(*arrays):
        return streamed(*arrays, key_mask, -0.7, rows)

    assert torch.autograd.gradcheck(compute, (theta, phi, g))
    assert torch.autograd.gradgradcheck(compute, (theta, phi, g))


@every_form
def test_a_third_derivative_is_that_of_the_matrix(pairwise):
    arrays = leaves()

    def third(compute):
        gradients = arrays
        for _ in range(3):
            total = torch.stack([a.sin().sum() for a in (compute(*arrays), *gradients)]).sum()
            gradients = torch.autograd.grad(total, arrays, create_graph=True)
        return gradients

    torch.testing.assert_close(third(operation(pairwise)), third(operation(pairwise, method="pairwise")))


@every_mask
@pytest.mark.parametrize("threads", [1, 2, 3, 64])
def test_the_gradient_is_the_same_on_any_number_of_threads(threads, key_mask):
    before = torch.get_num_threads()
    arrays = leaves(values=2)
    expected = torch.autograd.grad(operation("embedded_gaussian", key_mask, "pairwise")(*arrays).square().sum(), arrays)
    torch.set_num_threads(threads)
    try:
        y = operation("embedded_gaussian", key_mask)(*arrays)
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), arrays), expected)
    finally:
        torch.set_num_threads(before)


@every_form
@pytest.mark.parametrize("sizes", [(0, 5, 4), (2, 0, 4)], ids=str)
def test_without_samples_or_queries_the_result_is_empty(pairwise, sizes):
    arrays = leaves(*sizes)
    y = operation(pairwise)(*arrays)
    assert y.shape == (*sizes[:2], 3)
    assert [a.shape for a in torch.autograd.grad(y.sum(), arrays)] == [a.shape for a in arrays]


@every_form
def test_a_graph_that_is_retained_gives_the_same_gradient_again(pairwise):
    arrays = leaves()
    total = operation(pairwise)(*arrays).square().sum()
    first, second = (torch.autograd.grad(total, arrays, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_form
def test_one_tensor_may_serve_as_theta_phi_and_g(pairwise):
    x = random(2, 4, 3).requires_grad_()
    results = [operation(pairwise, method=method)(x, x, x).square().sum() for method in (None, "pairwise")]
    torch.testing.assert_close(*(torch.autograd.grad(result, x) for result in results))


@every_form
@pytest.mark.parametrize("needed", [[0], [1], [2], [0, 2]], ids=str)
def test_a_gradient_that_is_not_asked_for_is_left_out(pairwise, needed):
    arrays = [a if number in needed else a.detach() for number, a in enumerate(leaves())]
    wanted = [arrays[number] for number in needed]
    results = [operation(pairwise, method=method)(*arrays).square().sum() for method in (None, "pairwise")]
    torch.testing.assert_close(*(torch.autograd.grad(result, wanted) for result in results))


@every_form
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_gives_the_gradients_without_one(pairwise, reentrant):
    compute, arrays = operation(pairwise), leaves()
    expected = torch.autograd.grad(compute(*arrays).square().sum(), arrays)
    checkpoint(compute, *arrays, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close([a.grad for a in arrays], list(expected))


@every_form
def test_a_checkpoint_keeps_no_operand(pairwise):
    compute, arrays, kept = operation(pairwise), leaves(), []

    def step(*given):
        operands = [a.sin() for a in given]
        kept.extend(weakref.ref(a) for a in operands)
        return compute(*operands)

    y = checkpoint(step, *arrays, use_reentrant=False)
    assert y.requires_grad
    assert [reference() for reference in kept] == [None, None, None]


@every_form
@quiet
def test_transforms_of_functions_agree_with_the_matrix(pairwise):
    arrays = [a.detach() for a in leaves()]
    directions = tuple(random(*a.shape, seed=7) for a in arrays)

    def transformed(compute):
        def of_sample(*sample):
            return compute(*(a[None] for a in sample)).square().sum()

        each = torch.func.vmap(torch.func.grad(of_sample, argnums=(0, 1, 2)))(*arrays)
        hessian = torch.func.hessian(lambda theta: compute(theta, *arrays[1:]).square().sum())(arrays[0])
        return each, hessian, torch.func.jvp(compute, tuple(arrays), directions)

    torch.testing.assert_close(transformed(operation(pairwise)), transformed(operation(pairwise, method="pairwise")))


# Memory


@every_form
def test_a_training_step_holds_no_matrix(pairwise):
    arrays = leaves(1, 700, 600, 4, 4, dtype=torch.float32)
    compute = operation(pairwise, inner=4, dtype=torch.float32)
    with LargestResult() as largest:
        torch.autograd.grad(compute(*arrays).square().sum(), arrays)
    assert 0 < largest.size < 700 * 600 / 10


@pytest.mark.parametrize("method", ["streamed", "pairwise"])
def test_fused_attention_holds_no_matrix_in_training(method):
    arrays = leaves(1, 6000, 5000, 8, 8, dtype=torch.float32)
    compute = operation("embedded_gaussian", method=method)
    _, grown = peak_resident(lambda: torch.autograd.grad(compute(*arrays).sum(), arrays))
    matrix = 4 * 6000 * 5000
    if grown is not None:  # Linux alone tells
        assert grown < matrix / 8 if method == "streamed" else grown >= matrix


@pytest.mark.parametrize("rows", [None, 64])
def test_a_second_derivative_holds_a_block_of_queries_at_a_time(rows):
    arrays = leaves(1, 900, 800, 4, 4, dtype=torch.float32)
    with LargestResult() as largest:
        y = streamed(*arrays, None, 1.0, rows)
        gradients = torch.autograd.grad(y.square().sum(), arrays, create_graph=True)
        torch.autograd.grad(gradients[0].square().sum(), arrays)
    assert 0 < largest.size <= 128 * 900


@every_form
def test_a_block_trains_without_the_matrix(pairwise):
    x = random(1, 6, 26, 27).requires_grad_()
    block = random_block(pairwise=pairwise, norm="batch", method=EXACT[pairwise])
    with LargestResult() as largest:
        torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])
    assert 0 < largest.size < (26 * 27) ** 2 / 10


# Numbers


@pytest.mark.parametrize("keys", [1, 31, 32, 33, 63, 64, 65, 130])
@pytest.mark.parametrize("queries", [1, 40])
def test_sums_over_sorted_keys_are_right_at_the_edge_of_a_block(keys, queries):
    arrays = leaves(2, queries, keys)
    results = [operation("concatenation", method=method)(*arrays) for method in (None, "pairwise")]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(y.square().sum(), arrays) for y in results]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_running_sums_are_the_same_with_and_without_a_product():
    rows = random(2, 3, 32, 4)
    torch.testing.assert_close(running_sums(rows, by_product=True), running_sums(rows, by_product=False))


def test_a_large_key_that_does_not_count_leaves_no_rounding_error():
    theta, phi, g = torch.rand(1, 50, 1), torch.rand(1, 100, 1), torch.rand(1, 100, 2)
    phi[0, 40], g[0, 40] = -1e9, 1e3
    weight = torch.ones(2)
    results = [
        nonlocal_op(theta, phi, g, "concatenation", concat_weight=weight, method=method)
        for method in ("sorted", "pairwise")
    ]
    torch.testing.assert_close(*results, rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("method", ["exact", "pairwise"])
@every_form
def test_what_stands_in_one_query_does_not_reach_another(pairwise, method, value):
    compute = operation(pairwise, method=None if method == "exact" else method)
    theta, phi, g = (a.detach() for a in leaves(2, 40, 33))
    expected = compute(theta, phi, g)
    theta[1, 7] = value
    y = compute(theta, phi, g)
    others = torch.ones(2, 40, dtype=torch.bool)
    others[1, 7] = False
    torch.testing.assert_close(y[others], expected[others], rtol=1e-12, atol=1e-12)


def test_the_gradient_of_the_scores_of_a_single_key_is_exactly_zero():
    arrays = leaves(keys=1)
    dtheta, dphi = torch.autograd.grad(operation("embedded_gaussian")(*arrays).square().sum(), arrays[:2])
    assert not dtheta.any()
    assert not dphi.any()


# Graphs


def compiled_once(block, step):
    """Return what four steps give with a block that is compiled as one graph, and never anew."""
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=graphs)
    with dynamo.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        steps = [step(compiled) for _ in range(4)]
    assert graphs.frame_count == 1
    return steps


@quiet
@pytest.mark.parametrize(
    ("pairwise", "masked", "mode"),
    [
        ("gaussian", False, "evaluation"),
        ("gaussian", True, "training"),
        ("gaussian", False, "autocast"),
        ("embedded_gaussian", True, "evaluation"),
        ("embedded_gaussian", False, "training"),
        ("embedded_gaussian", True, "autocast"),
        ("dot_product", False, "evaluation"),
        ("dot_product", True, "training"),
        ("dot_product", False, "autocast"),
        ("concatenation", True, "evaluation"),
        ("concatenation", False, "training"),
        ("concatenation", True, "autocast"),
    ],
)
def test_a_block_is_compiled_once_for_all_steps_at_one_shape(pairwise, masked, mode):
    torch.compiler.reset()
    is_training, is_mixed = mode == "training", mode == "autocast"
    block = random_block(pairwise=pairwise, norm="batch", method=EXACT[pairwise]).float().train(is_training)
    x, shown = random(2, 6, 5, 7, dtype=torch.float32), random(2, 5, 7) > -1 if masked else None

    def step(compute):
        with torch.set_grad_enabled(is_training), torch.autocast("cpu", torch.bfloat16, is_mixed):
            z = compute(x, shown)
        return z, torch.autograd.grad(z.sin().sum(), list(block.parameters())) if is_training else ()

    steps = compiled_once(block, step)
    bound = 0.02 if is_mixed else 1e-4
    torch.testing.assert_close(steps, [step(block)] * 4, rtol=bound, atol=bound)


@quiet
def test_a_block_that_is_compiled_anew_in_its_second_step_is_found():
    class Counting(NonLocalBlock):
        calls = 0

        def forward(self, x, key_mask=None):
            self.calls += 1
            return super().forward(x, key_mask) * self.calls

    torch.compiler.reset()
    with pytest.raises(FailOnRecompileLimitHit):
        compiled_once(Counting(6), lambda compute: compute(random(2, 6, 5, 7, dtype=torch.float32)))


@quiet
@pytest.mark.parametrize(
    ("pairwise", "key_mask"),
    [("embedded_gaussian", SOME_MASKED), ("concatenation", None)],  # the others train in a block, above
    ids=["embedded_gaussian", "concatenation"],
)
def test_a_compiled_operation_trains_in_one_graph(pairwise, key_mask):
    torch.compiler.reset()
    arrays, compute = leaves(), operation(pairwise, key_mask)
    compiled = torch.compile(compute, fullgraph=True, backend=CompileCounterWithBackend("aot_eager"))
    gradients = torch.autograd.grad(compiled(*arrays).square().sum(), arrays)
    torch.testing.assert_close(gradients, torch.autograd.grad(compute(*arrays).square().sum(), arrays))


@quiet
@pytest.mark.parametrize(
    ("pairwise", "subsample", "strict"),
    [
        ("gaussian", 2, True),
        ("gaussian", None, False),
        ("embedded_gaussian", None, True),
        ("embedded_gaussian", 2, False),
        ("dot_product", 2, True),
        ("dot_product", None, False),
        ("concatenation", None, True),  # (..., 2, False): test_torch_deploy.py
    ],
)
def test_one_export_serves_every_size(pairwise, subsample, strict):
    block = random_block(pairwise=pairwise, subsample=subsample).eval()
    # To PyTorch a size of 1, of the pooled grid too, is a case of its own.
    batch, height, width = (torch.export.Dim(name, min=4) for name in ("batch", "height", "width"))
    sizes = {"x": {0: batch, 2: height, 3: width}}
    program = torch.export.export(block, (random(5, 6, 7, 9),), dynamic_shapes=sizes, strict=strict).module()
    small, large = random(4, 6, 4, 5), random(6, 6, 12, 17)
    torch.testing.assert_close((program(small), program(large)), (block(small), block(large)))


# Layers


@pytest.mark.parametrize(
    ("options", "products"),
    [
        ({}, 1),
        ({"pairwise": "gaussian"}, 1),
        ({"subsample": 2}, 1),
        ({"subsample": 2, "subsample_at": "input"}, 2),
        ({"bias": False}, 1),
        ({"bias": {"phi": False}}, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("shown", [None, torch.ones(2, 5, 7, dtype=torch.bool)], ids=["no mask", "mask"])
def test_layers_that_share_their_input_are_one_product(options, products, shown):
    block, x = random_block(**options), random(2, 6, 5, 7)
    with Products() as counted:
        block(x, shown)
    assert counted.count == products


def test_large_layers_of_few_positions_are_products_of_their_own():
    block, x = random_block(), random(1, 6, 8)
    with Products() as counted:
        block(x)
    assert counted.count == 3
    torch.testing.assert_close(block(x), block(x.repeat(1, 1, 2))[..., :8])


@pytest.mark.parametrize("bias", [True, {"phi": False}, {"theta": False, "g": False}, False], ids=str)
@pytest.mark.parametrize("size", [8, 80])
def test_a_bias_that_is_absent_adds_nothing(bias, size):
    some, every = random_block(bias=bias), random_block()
    with torch.no_grad():
        for layer in ("theta", "phi", "g", "out"):
            there, own = every.get_submodule(layer), some.get_submodule(layer)
            there.weight.copy_(own.weight)
            there.bias.zero_() if own.bias is None else there.bias.copy_(own.bias)
    x = random(1, 6, size)
    torch.testing.assert_close(some(x), every(x))


def test_attention_uses_neither_values_nor_the_rows_that_are_not_asked_for():
    block, x = random_block(), random(1, 6, 5, 7)
    used = torch.autograd.grad(
        block.attention(x, positions=[3]).square().sum(), list(block.parameters()), allow_unused=True
    )
    names = [name for (name, _), gradient in zip(block.named_parameters(), used, strict=True) if gradient is not None]
    assert names == ["theta.weight", "theta.bias", "phi.weight", "phi.bias"]
    with LargestResult() as largest:
        block.attention(x, positions=[3])
    assert largest.size < 35 * 35


@pytest.mark.parametrize("kind", ["batch", "affine"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_fixed_norm_is_folded_into_the_layer_before_it(kind, bias):
    block, x = random_block(norm=kind, bias=bias).eval(), random(2, 6, 35)
    plain, state = random_block(bias=bias), block.state_dict()
    plain.load_state_dict({name: a for name, a in state.items() if not name.startswith("norm")})
    r = plain(x) - x
    if kind == "batch":
        deviation = (state["norm.running_var"] + block.spec.norm_epsilon).sqrt()
        r = (r - state["norm.running_mean"][:, None]) / deviation[:, None]
    expected = x + r * state["norm.weight"][:, None] + state["norm.bias"][:, None]
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


def test_a_hook_on_the_norm_is_called_in_evaluation():
    block, seen = random_block(norm="batch").eval(), []
    x = random(2, 6, 5, 7)
    folded = block(x)
    block.norm.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape))
    torch.testing.assert_close(block(x), folded, rtol=1e-12, atol=1e-12)
    assert seen == [(2, 6, 35)]


def test_a_norm_frozen_in_training_keeps_its_statistics():
    block, x = random_block(norm="batch"), random(2, 6, 5, 7)
    expected = block.eval()(x)
    block.train().norm.eval()
    torch.testing.assert_close(block(x), expected)
    assert block.norm.num_batches_tracked == 0


def test_a_norm_without_running_statistics_normalises_in_evaluation():
    block, x = random_block(norm="batch"), random(2, 6, 5, 7)
    expected = block(x)
    block.norm.running_mean = block.norm.running_var = None
    torch.testing.assert_close(block.eval()(x), expected)


@pytest.mark.parametrize("shape", [(2, 6, 5, 7), (2, 6, 1, 2), (1, 6, 3, 5, 7)], ids=str)
@pytest.mark.parametrize("residual", [True, False])
def test_the_layout_is_kept_in_training_and_in_evaluation(shape, residual):
    last = {4: torch.channels_last, 5: torch.channels_last_3d}[len(shape)]
    block, x = random_block(norm="batch", residual=residual), random(*shape)
    expected = block(x)
    for z in (block(x.contiguous(memory_format=last)), block(x.contiguous(memory_format=last).requires_grad_())):
        assert z.is_contiguous(memory_format=last)
        torch.testing.assert_close(z, expected, rtol=1e-12, atol=1e-12)
