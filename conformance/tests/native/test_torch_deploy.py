"""Blocks, and PyTorch networks with blocks in them, as they are deployed: folded, compiled, exported, distributed."""

import copy
import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch_blocks import in_two_processes, random

from nonlocal_torch import NonLocalBlock, insert_nonlocal

# Modules that are slow to import are imported where they are used: the processes at the end run this file too.


@pytest.fixture(autouse=True)
def _one_thread():
    """Compute in one thread: arrays this small only wait for other threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomised(model):
    """Return the model with random parameters and statistics."""
    with torch.no_grad():
        for seed, tensor in enumerate((*model.parameters(), *model.buffers())):
            if tensor.is_floating_point():
                tensor.copy_(random(*tensor.shape, seed=seed).abs() / 2 + 0.1)
    return model


def random_block(dtype=torch.float64, **options):
    return randomised(NonLocalBlock(6, dtype=dtype, **options))


def network(**options):
    """Return a network with a block inside."""
    model = nn.Sequential(nn.Conv2d(3, 6, 2), nn.ReLU(), nn.Conv2d(6, 2, 1)).double()
    insert_nonlocal(model, ["1"], example_input=random(2, 3, 9, 6), **options)
    return randomised(model)


# Folding


@pytest.mark.parametrize("norm", ["batch", "affine"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_folded_norm_computes_the_same(norm, bias):
    block, x = random_block(norm=norm, bias=bias, subsample=2, method="pairwise").eval(), random(2, 6, 5, 7)
    folded = block.fold_norm()
    assert (folded.norm, folded.method, folded.training) == (None, "pairwise", False)
    assert folded.spec == block.spec.replace(norm=None, bias={**block.spec.bias, "out": True})
    torch.testing.assert_close(folded(x), block(x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_folded_block_has_the_dtype_and_the_mode(dtype):
    folded = NonLocalBlock(6, norm="batch", dtype=dtype).fold_norm()
    assert {p.dtype for p in folded.parameters()} == {dtype}
    assert folded.training


def test_a_block_without_norm_has_none_to_fold():
    with pytest.raises(ValueError, match=r"`norm` must be 'batch' or 'affine' to be folded\. Got None"):
        NonLocalBlock(6).fold_norm()


# Compilation and export

quiet = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # PyTorch's own instance


@quiet
def test_a_compiled_network_trains_its_block():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    model, x = network(subsample=2, norm="batch"), random(2, 3, 9, 6)
    twin, graphs = copy.deepcopy(model), CompileCounterWithBackend("aot_eager")
    z = torch.compile(model, fullgraph=True, backend=graphs)(x)
    z.square().sum().backward()
    twin(x).square().sum().backward()
    gradients = [{name: p.grad for name, p in net.named_parameters()} for net in (model, twin)]
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
    assert graphs.frame_count == 1


@quiet
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # of what PyTorch 2.9 reads itself
@pytest.mark.parametrize("pairwise", ["gaussian", "concatenation"])  # the others: test_torch_methods.py
def test_an_exported_network_serves_every_size(pairwise):
    model = network(pairwise=pairwise, subsample=2, norm="batch").eval()
    # To PyTorch a size of 1, of the pooled grid too, is a case of its own.
    batch, height, width = (torch.export.Dim(name, min=5) for name in ("batch", "height", "width"))
    sizes, file = ({0: batch, 2: height, 3: width},), io.BytesIO()
    program = torch.export.export(model, (random(6, 3, 9, 7),), dynamic_shapes=sizes)
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for x in (random(5, 3, 5, 8), random(7, 3, 13, 11)):
        torch.testing.assert_close(loaded(x), model(x))


# ONNX


# PyTorch's own warning, of what its exporter does.
onnx_export = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")


def exported(pairwise, subsample=None, opset=None):
    """Return a block and its model in ONNX, for every batch, height and width."""
    block = random_block(torch.float32, pairwise=pairwise, subsample=subsample, norm="batch").eval().fold_norm()
    example, sizes = (random(2, 6, 7, 9).float(),), {"x": {0: "batch", 2: "height", 3: "width"}}
    program = torch.onnx.export(block, example, dynamo=True, dynamic_shapes=sizes, opset_version=opset, verbose=False)
    return block, program.model_proto


def run(model, x, **settings):
    """Return what ONNX Runtime gives, with its own optimisations unless told otherwise."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    for name, value in settings.items():
        setattr(options, name, value)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, {"x": x.numpy()})


def largest(model, x):
    """Return how many elements the largest array has that some step of a model gives."""
    import onnx
    import onnxruntime

    whole = onnx.ModelProto.FromString(model.SerializeToString())
    names = {name for node in whole.graph.node for name in node.output if name}
    del whole.graph.output[:]
    whole.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(names))
    return max(
        a.size for a in run(whole, x, graph_optimization_level=onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)
    )


def check_parity(block, model, *shapes):
    for shape in shapes:
        x = random(*shape).float()
        with torch.no_grad():
            expected = block(x).numpy()
            bound = 64 * np.finfo(np.float32).eps * np.abs(expected).max()
            np.testing.assert_allclose(run(model, x)[0], expected, rtol=0, atol=bound)


SIZES = (3, 6, 5, 8), (1, 6, 14, 11)
LARGE, MATRIX = random(1, 6, 26, 27).float(), (26 * 27) ** 2
POOLED_MATRIX = 26 * 27 * 13 * 13


@onnx_export
def test_onnx_runtime_computes_a_pooled_softmax_form_at_every_size():
    check_parity(*exported("gaussian", 2), *SIZES)


@onnx_export
@pytest.mark.parametrize(
    ("pairwise", "subsample", "matrix"), [("dot_product", None, MATRIX), ("concatenation", 2, POOLED_MATRIX)]
)
def test_onnx_runtime_computes_the_same_at_every_size_and_without_a_matrix_that_a_form_does_not_need(
    pairwise, subsample, matrix
):
    block, model = exported(pairwise, subsample)
    check_parity(block, model, *SIZES)
    assert largest(model, LARGE) < matrix / 10


@onnx_export
def test_onnx_has_an_operation_for_the_softmax_forms_from_opset_23_alone():
    (block, before), (_, after) = exported("embedded_gaussian"), exported("embedded_gaussian", opset=23)
    assert largest(before, LARGE) == MATRIX
    assert largest(after, LARGE) < MATRIX / 10  # what the operation itself holds is up to the runtime
    assert "Attention" in {node.op_type for node in after.graph.node}
    check_parity(block, before, *SIZES)
    check_parity(block, after, *SIZES)


# Several processes

CASES = {
    "no norm": {"pairwise": "concatenation"},
    "affine": {"norm": "affine", "subsample": 2},
    "batch": {"norm": "batch", "pairwise": "dot_product"},
}
WHOLE = random(4, 3, 9, 6, seed=3)


class Synchronised(nn.BatchNorm1d):
    """Batch normalisation over the batches of all processes; PyTorch's own works on GPUs alone."""

    def forward(self, a):
        count = a.new_full((self.num_features,), a.shape[0] * a.shape[2])
        sums = torch.stack([count, a.sum((0, 2)), a.square().sum((0, 2))])
        count, total, squares = distributed.nn.functional.all_reduce(sums)
        mean = total / count
        variance = squares / count - mean.square()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scaled = (a - mean[:, None]) * torch.rsqrt(variance + self.eps)[:, None]
        return scaled * self.weight[:, None] + self.bias[:, None]


def step(model, x):
    """Return the gradients and the statistics after a step of training."""
    model(x).square().mean().backward()
    model = getattr(model, "module", model)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return gradients, {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}


def train(rank):
    """Return a step of training on half of the batch, in one of two processes."""
    results = {}
    for name, options in CASES.items():
        model = network(**options)
        block = model[1].nonlocal_block
        if options.get("norm") == "batch":
            state = block.norm.state_dict()
            block.norm = Synchronised(6, block.norm.eps, block.norm.momentum).double()
            block.norm.load_state_dict(state)
        results[name] = step(nn.parallel.DistributedDataParallel(model), WHOLE.chunk(2)[rank])
    return results


def test_two_processes_train_as_one_on_the_whole_batch(tmp_path):
    subprocess.run([sys.executable, __file__, str(tmp_path)], check=True, timeout=240)
    expected = {case: step(network(**options), WHOLE) for case, options in CASES.items()}
    # In one test: the two processes take seconds to begin, and tests may be spread over several workers.
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected, rtol=1e-12, atol=1e-12)


def test_synchronised_batch_norm_takes_the_place_of_that_in_a_network():
    model, x = network(norm="batch").eval(), random(2, 3, 9, 6)
    expected = model(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(converted[1].nonlocal_block.norm, nn.SyncBatchNorm)
    torch.testing.assert_close(converted(x), expected, rtol=1e-13, atol=1e-13)


if __name__ == "__main__":
    in_two_processes(train, sys.argv[1])
