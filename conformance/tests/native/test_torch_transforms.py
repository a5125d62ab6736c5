"""Blocks inside what PyTorch makes of functions: checkpoints, vmap, symbolic traces, scripts, the older exporter."""

import io
from functools import partial

import numpy as np
import pytest
import torch
import torch_blocks
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from nonlocal_torch import NonLocalBlock, attention_of, insert_nonlocal

FORMS = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
every_form = pytest.mark.parametrize("pairwise", FORMS)


random = partial(torch_blocks.random, dtype=torch.float32)
random_block = partial(torch_blocks.random_block, dtype=torch.float32)


@pytest.mark.parametrize("method", ["streamed", "pairwise"])
def test_a_checkpoint_runs_the_forward_pass_twice(method):
    host, block, calls = nn.BatchNorm2d(6), random_block(method=method), []
    block.register_forward_pre_hook(lambda *_: calls.append(1))
    x = random(2, 6, 5, 7).requires_grad_()
    checkpoint(lambda a: block(host(a)), x, use_reentrant=False).square().sum().backward()
    assert len(calls) == host.num_batches_tracked == 2
    gradient, x.grad = x.grad, None
    block(host(x)).square().sum().backward()
    torch.testing.assert_close(gradient, x.grad)


def test_tensors_that_are_kept_elsewhere_give_the_same_gradient():
    block, x, sizes = random_block(method="streamed"), random(2, 6, 5, 7).requires_grad_(), []
    (expected,) = torch.autograd.grad(block(x).square().sum(), x)

    def keep(a):
        sizes.append(a.numel())
        return a.clone()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda a: a):
        y = block(x).square().sum()
    torch.testing.assert_close(torch.autograd.grad(y, x, retain_graph=True)[0], expected)
    torch.testing.assert_close(torch.autograd.grad(y, x)[0], expected)
    assert len(sizes) > 4  # those of the fused attention among them


@every_form
@pytest.mark.parametrize("shape", [(3, 6, 7), (3, 6, 5, 4), (3, 6, 4, 5, 3)], ids=str)
def test_a_block_is_mapped_over_samples_of_every_rank(pairwise, shape):
    block, x = random_block(dtype=torch.float64, pairwise=pairwise, subsample=2), random(*shape, dtype=torch.float64)
    each = torch.func.vmap(lambda sample: block(sample[None])[0])(x)
    torch.testing.assert_close(each, block(x))
    found = torch.func.vmap(torch.func.grad(lambda sample: block(sample[None]).square().sum()))(x)
    (expected,) = torch.autograd.grad(block(x.requires_grad_()).square().sum(), x)
    torch.testing.assert_close(found, expected)


def network(**options):
    model = nn.Sequential(nn.Conv2d(3, 6, 2), nn.Sequential(nn.ReLU(), random_block(**options)), nn.Conv2d(6, 2, 1))
    insert_nonlocal(model, ["1.0"], example_input=random(2, 3, 9, 7), zero_init=False)
    return model.eval()


def test_a_block_is_a_leaf_of_a_symbolic_trace():
    model, x = network(norm="batch"), random(2, 3, 9, 7)
    traced = fx.symbolic_trace(model)
    assert "1.1" in [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert torch.equal(traced(x), model(x))
    # A part of the graph, as torchvision's `create_feature_extractor` takes it.
    inside = next(node for node in traced.graph.nodes if node.target == "1.1")
    traced.graph.output(inside)
    traced.graph.erase_node(list(traced.graph.nodes)[-2])
    assert torch.equal(fx.GraphModule(traced, traced.graph)(x), model[1](model[0](x)))


def test_a_mask_goes_through_a_symbolic_trace():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = random_block()

        def forward(self, x, shown):
            return self.block(x, key_mask=shown)

    model, x, shown = Masked(), random(2, 6, 9), random(2, 9) > 0
    assert torch.equal(fx.symbolic_trace(model)(x, shown), model(x, shown))


def test_a_symbolic_trace_of_a_block_alone_says_what_to_trace():
    with pytest.raises(
        ValueError, match=r"`x` must be a tensor: a symbolic trace .* `nn.Sequential\(block\)`. Got Proxy"
    ):
        fx.symbolic_trace(random_block())


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("model", [random_block, network], ids=["block", "network"])
def test_a_script_is_refused(model):
    with pytest.raises(
        TypeError, match=r"`obj` must hold no NonLocalBlock to be compiled by torch.jit.script; torch.ex"
    ):
        torch.jit.script(model())


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore:Constant folding:UserWarning"
)
@every_form
def test_the_older_exporter_to_onnx_serves_every_size(pairwise):
    import onnxruntime

    block, file = random_block(pairwise=pairwise, subsample=2, norm="batch").eval(), io.BytesIO()
    sizes = {"x": {0: "batch", 2: "height", 3: "width"}}
    torch.onnx.export(block, (random(2, 6, 7, 9),), file, dynamo=False, input_names=["x"], dynamic_axes=sizes)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for shape in [(3, 6, 5, 8), (1, 6, 14, 11)]:
        x = random(*shape)
        expected = block(x).detach().numpy()
        bound = 64 * np.finfo(np.float32).eps * np.abs(expected).max()
        np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], expected, rtol=0, atol=bound)


@every_form
def test_a_batch_of_nothing_trains_as_through_batch_norm_alone(pairwise):
    block, alone = random_block(pairwise=pairwise, norm="batch"), nn.BatchNorm1d(6)
    before, x = block.norm.running_var.clone(), torch.zeros(0, 6, 5, 7, requires_grad=True)
    z = block(x)
    z.sum().backward()
    alone(torch.zeros(0, 6, 5))
    assert z.shape == x.grad.shape == (0, 6, 5, 7)
    assert torch.equal(block.norm.running_var, before)
    assert torch.equal(alone.running_var, torch.ones(6))
    assert block.norm.num_batches_tracked == alone.num_batches_tracked
    assert not block.out.weight.grad.any()


@pytest.mark.parametrize("shape", [(2, 35, 6), (2, 5, 7, 6), (2, 3, 5, 4, 6)], ids=str)
def test_a_block_takes_channels_last(shape):
    options = {"subsample": 2, "norm": "batch"}
    block, first = random_block(data_format="channels_last", **options), random_block(**options)
    x = random(*shape)
    shown = random(*shape[:-1]) > -1
    z = block(x, shown)
    torch.testing.assert_close(z, first(x.movedim(-1, 1), shown).movedim(1, -1))
    assert z.is_contiguous()
    torch.testing.assert_close(block.attention(x, [2]), first.attention(x.movedim(-1, 1), [2]))
    assert "data_format='channels_last'" in repr(block)
    torch.testing.assert_close(block.eval().fold_norm()(x), block(x))
    assert attention_of(nn.Sequential(block), x, positions=[0]).sizes == shape[1:-1]


def test_an_unknown_data_format_is_named():
    with pytest.raises(ValueError, match=r"`data_format` must be one of 'channels_first', 'channels_last'. Got 'NHWC'"):
        NonLocalBlock(6, data_format="NHWC")
