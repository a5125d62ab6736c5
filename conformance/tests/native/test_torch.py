"""What PyTorch's users expect of a module, beyond the numbers."""

import copy
import io
import pickle
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parameters_to_vector

import nonlocal_core as nlc
from nonlocal_torch import NonLocalBlock, nonlocal_op

FORMS = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")


def random_block(**options):
    """Return a block in float64 whose every parameter is random."""
    block = NonLocalBlock(6, dtype=torch.float64, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*block.parameters(), *block.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) + 0.1)
    return block


def random_input(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def product(theta, phi):
    return theta @ phi.mT


STATE = {
    "gaussian": ["g.weight", "g.bias", "out.weight", "out.bias"],
    "embedded_gaussian": [f"{layer}.{kind}" for layer in ("theta", "phi", "g", "out") for kind in ("weight", "bias")],
    "concatenation": [
        *(f"{layer}.{kind}" for layer in ("theta", "phi", "g") for kind in ("weight", "bias")),
        "concat.weight",
        "concat.bias",
        *("out.weight", "out.bias"),
    ],
}
NORM = ["norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"pairwise": "gaussian"}, STATE["gaussian"]),
        ({"pairwise": "embedded_gaussian", "norm": "batch"}, STATE["embedded_gaussian"] + NORM),
        ({"pairwise": "dot_product", "norm": "affine"}, STATE["embedded_gaussian"] + NORM[:2]),
        ({"pairwise": "concatenation", "bias": {"concat": True}}, STATE["concatenation"]),
        ({"bias": False}, [name for name in STATE["embedded_gaussian"] if name.endswith("weight")]),
    ],
)
def test_the_state_has_the_canonical_names(options, names):
    assert sorted(NonLocalBlock(6, **options).state_dict()) == sorted(names)


def test_the_state_of_one_block_loads_into_another():
    first, second = random_block(norm="batch"), NonLocalBlock(6, norm="batch", dtype=torch.float64)
    second.load_state_dict(first.state_dict())
    x = random_input(2, 6, 5, 7)
    assert torch.equal(first.eval()(x), second.eval()(x))


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))],  # noqa: S301 - our own bytes
    ids=["deepcopy", "pickle"],
)
@pytest.mark.parametrize(
    "options",
    [{"norm": "batch", "subsample": 2}, {"pairwise": product, "normalize": "count"}],
    ids=["named", "function"],
)
def test_a_copy_computes_the_same_with_parameters_of_its_own(copied, options):
    block = random_block(**options).eval()
    twin, x = copied(block), random_input(2, 6, 5, 7)
    assert twin.spec == block.spec
    expected = block(x)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        twin.out.weight.zero_()
    assert torch.equal(block(x), expected)


def test_a_whole_module_is_saved_and_loaded_with_its_spec():
    block, buffer = random_block(scale=-2.0, axes=[1]), io.BytesIO()
    torch.save(block, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert loaded.spec == block.spec
    assert torch.equal(parameters_to_vector(loaded.parameters()), parameters_to_vector(block.parameters()))


def test_its_text_shows_the_options_that_differ_from_their_defaults():
    text = repr(NonLocalBlock(6, pairwise="dot_product", subsample=[1, 2], bias={"g": False}, method="pairwise"))
    assert "6, pairwise='dot_product', subsample=(1, 2), bias={'g': False}, method='pairwise'" in text
    assert NonLocalBlock(6).extra_repr() == "6"


@pytest.mark.parametrize("pairwise", FORMS)
def test_parameters_are_made_on_the_device_and_in_the_dtype_asked_for(pairwise):
    block = NonLocalBlock(6, pairwise=pairwise, norm="batch", device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in block.parameters()} == {("meta", torch.float16)}
    assert block(torch.empty(2, 6, 5, 7, device="meta", dtype=torch.float16)).shape == (2, 6, 5, 7)


@pytest.mark.parametrize("norm", [None, "batch", "affine"])
def test_a_block_starts_anew_from_the_seed(norm):
    block = NonLocalBlock(6, norm=norm)
    torch.manual_seed(3)
    block.reset_parameters()
    first = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    block(random_input(2, 6, 5, 7, dtype=torch.float32))
    torch.manual_seed(3)
    block.reset_parameters()
    assert all(torch.equal(tensor, first[name]) for name, tensor in block.state_dict().items())


def test_it_learns_from_its_start():
    torch.manual_seed(0)
    block, x = NonLocalBlock(6, norm="batch"), random_input(4, 6, 9, dtype=torch.float32)
    optimizer, losses = torch.optim.SGD(block.parameters(), lr=0.1, momentum=0.9), []
    for _ in range(30):
        loss = (block(x) - 0.5 * x.flip(0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert block.norm.num_batches_tracked == 30


def test_synchronised_batch_norm_takes_the_place_of_batch_norm():
    converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(random_block(norm="batch"))
    assert isinstance(converted.norm, torch.nn.SyncBatchNorm)
    x = random_input(2, 6, 5, 7)
    # Its own norm is folded into the layer before it, which rounds otherwise.
    torch.testing.assert_close(converted.eval()(x), random_block(norm="batch").eval()(x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("options", [{"norm": "batch"}, {"norm": "affine"}, {"pairwise": "gaussian"}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_trains_and_keeps_the_dtype_of_the_input(options, dtype):
    block, x = NonLocalBlock(6, zero_init=False, **options), random_input(2, 6, 5, 7, dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        z = block(x)
    z.square().sum().backward()
    assert z.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("own", [True, False], ids=["block in the dtype", "block in float32"])
def test_an_input_of_another_dtype_gives_an_output_of_that_dtype(dtype, own):
    block, x = NonLocalBlock(6, norm="batch", zero_init=False), random_input(2, 6, 5, 7, dtype=torch.float32)
    expected = block.eval()(x)
    if own:
        block.to(dtype)
    z = block(x.to(dtype))
    assert z.dtype == dtype
    assert block.attention(x.to(dtype)).dtype == dtype
    torch.testing.assert_close(z.float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("pairwise", FORMS)  # by the other methods: test_torch_methods.py
def test_the_gradients_of_the_operation_and_theirs_by_the_pairwise_method_pass_gradcheck(pairwise):
    arrays = [random_input(2, size, 2).requires_grad_() for size in (3, 4, 4)]
    options = {"pairwise": pairwise, "method": "pairwise", "scale": -0.7}
    options["key_mask"] = torch.tensor([[True, False, True, True], [False] * 4])
    if pairwise == "concatenation":
        options |= {"concat_weight": random_input(4), "concat_bias": torch.tensor(0.3, dtype=torch.float64)}
    assert torch.autograd.gradcheck(lambda *a: nonlocal_op(*a, **options), arrays)
    assert torch.autograd.gradgradcheck(lambda *a: nonlocal_op(*a, **options), arrays)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # PyTorch's own import
@pytest.mark.parametrize("pairwise", FORMS)
def test_forward_mode_agrees_with_reverse_mode_by_the_pairwise_method(pairwise):
    block, x = random_block(pairwise=pairwise, subsample=2, method="pairwise"), random_input(2, 6, 5, 7)
    direction, dz = random_input(2, 6, 5, 7).flip(1), random_input(2, 6, 5, 7).flip(2)
    _, forward = torch.func.jvp(block, (x,), (direction,))
    (reverse,) = torch.autograd.grad(block(x.requires_grad_()), x, dz)
    torch.testing.assert_close((forward * dz).sum(), (reverse * direction).sum())


def test_gradients_per_sample_are_those_of_each_sample_alone():
    block, x = random_block(pairwise="dot_product"), random_input(3, 6, 7)
    params = dict(block.named_parameters())

    def loss(params, sample):
        return torch.func.functional_call(block, params, (sample[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x)
    for sample in range(3):
        block.zero_grad()
        block(x[sample : sample + 1]).square().sum().backward()
        for name, parameter in block.named_parameters():
            torch.testing.assert_close(each[name][sample], parameter.grad)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # PyTorch's own instance
@pytest.mark.parametrize("pairwise", FORMS)
def test_one_dynamic_graph_serves_training_at_several_sizes(pairwise):
    torch.compiler.reset()
    graphs, counts = CompileCounterWithBackend("aot_eager"), set()
    block = random_block(pairwise=pairwise, subsample=2, norm="batch", norm_momentum=0.0)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=graphs)
    for shape in [(2, 6, 5, 7), (3, 6, 9, 4), (4, 6, 6, 11)]:
        x = random_input(*shape)
        z = compiled(x)
        gradients = torch.autograd.grad(z.square().sum(), list(block.parameters()))
        torch.testing.assert_close(z, block(x))
        expected = torch.autograd.grad(block(x).square().sum(), list(block.parameters()))
        torch.testing.assert_close(gradients, expected)
        counts.add(graphs.frame_count)
    assert len(counts) == 1


def test_exported_parameters_are_copies():
    block = random_block()
    block.export_params()["g.weight"][:] = 0
    assert block.g.weight.count_nonzero() == block.g.weight.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_with_gradients_are_written_and_bfloat16_as_float32(dtype, tmp_path):
    block = NonLocalBlock(6, dtype=dtype)
    nlc.save_params(tmp_path / "block", dict(block.named_parameters()), block.spec)
    for name, array in nlc.load_params(tmp_path / "block")[0].items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, block.get_parameter(name).detach().float().numpy())


def without_affine(block):
    """Return a copy of a block whose norm has the same statistics, and neither weight nor bias."""
    plain = copy.deepcopy(block)
    plain.norm = torch.nn.BatchNorm1d(6, block.norm.eps, block.norm.momentum, affine=False, dtype=torch.float64)
    plain.norm.load_state_dict(block.norm.state_dict(), strict=False)
    return plain


def block_of_weight_1_and_bias_0(**options):
    block = random_block(norm="batch", **options)
    with torch.no_grad():
        block.norm.weight.fill_(1)
        block.norm.bias.fill_(0)
    return block


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["plain", "autocast"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_norm_without_weight_and_bias_computes_as_one_with_1_and_0(training, bias, dtype):
    block, x = block_of_weight_1_and_bias_0(bias=bias), random_input(2, 6, 5, 7)
    results = []
    for one in (block, without_affine(block)):
        one.train(training)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            z = one(x)
        z.square().sum().backward()
        gradients = {name: p.grad for name, p in one.named_parameters() if not name.startswith("norm")}
        results.append((z, gradients, one.norm.running_mean, one.norm.running_var))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_parameters_that_a_norm_lacks_are_exported_as_1_and_0():
    block, x = block_of_weight_1_and_bias_0(), random_input(2, 6, 5, 7)
    plain = without_affine(block).eval()
    expected, exported = block.export_params(), plain.export_params()
    assert list(exported) == list(expected)
    assert all(np.array_equal(exported[name], expected[name]) for name in expected)
    torch.testing.assert_close(plain.fold_norm()(x), plain(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "value"), [("norm.weight", 1), ("norm.bias", 0)])
def test_parameters_that_a_norm_lacks_are_taken_in_if_they_change_nothing(name, value):
    plain = without_affine(block_of_weight_1_and_bias_0())
    before = plain.export_params()
    other = {key: a if key.startswith("norm.") else a + 1 for key, a in before.items()}
    words = rf"`params\['{name}'\]` must be {value} throughout, since the norm here has none of its own"
    with pytest.raises(ValueError, match=words):
        plain.import_params({**other, name: np.full(6, 0.5)})
    after = plain.export_params()
    assert all(np.array_equal(after[key], before[key]) for key in before)
    plain.import_params(other)
    assert np.array_equal(plain.export_params()["out.weight"], before["out.weight"] + 1)


@pytest.mark.parametrize("norm", [torch.nn.Identity(), torch.nn.GroupNorm(2, 6, affine=False)], ids=["none", "groups"])
def test_a_module_without_parameters_takes_the_place_of_the_norm(norm):
    block, x = random_block(norm="batch"), random_input(2, 6, 5, 7)
    block.norm = torch.nn.Identity()
    r = block(x) - x
    block.norm = norm
    torch.testing.assert_close(block(x), x + norm(r.flatten(2)).reshape(x.shape), rtol=1e-12, atol=1e-12)


def test_parameters_of_bfloat16_are_exported_as_float32():
    block = NonLocalBlock(6, dtype=torch.bfloat16)
    exported = block.export_params()
    assert {a.dtype for a in exported.values()} == {np.dtype("float32")}
    assert np.array_equal(exported["g.weight"], block.g.weight.detach().float().numpy())


def test_positions_may_be_a_tensor():
    block, x = random_block(), random_input(2, 6, 5, 7)
    torch.testing.assert_close(block.attention(x, torch.tensor([3, 1])), block.attention(x)[:, [3, 1]])


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"metod": "auto"}, TypeError, "`metod` must be an option of NonLocalBlock. .* nearest is `method`"),
        ({"subsampel": 2}, TypeError, "`subsampel` must be an option of NonLocalBlock"),
        ({"method": "sorted"}, ValueError, "`method` must be 'auto', 'pairwise' or 'streamed' for the form"),
        ({"pairwise": "cosine"}, ValueError, "`pairwise` must be one of"),
        ({"channels": 0}, ValueError, "`channels` must be a positive int. Got 0"),
    ],
)
def test_wrong_options_are_named(options, error, words):
    with pytest.raises(error, match=words):
        NonLocalBlock(**{"channels": 6, **options})


def test_without_pytorch_the_import_says_what_to_install():
    code = "import sys; sys.modules['torch'] = None; import nonlocal_torch"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert (
        "ImportError: nonlocal_torch needs PyTorch. Install it with `pip install 'nonlocal-core[torch]'`." in ran.stderr
    )


@pytest.mark.parametrize("method", ["auto", "pairwise"])
def test_the_operation_keeps_the_dtype_of_theta_under_autocast(method):
    theta, phi, g = (random_input(2, size, 6, dtype=torch.float32) for size in (5, 4, 4))
    expected = nonlocal_op(theta, phi, g)
    with torch.autocast("cpu", torch.bfloat16):
        y = nonlocal_op(theta, phi, g, method=method)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("wrong", [np.ones((2, 6, 5), "float32"), [[1.0]]], ids=["NumPy", "list"])
def test_an_input_that_is_no_tensor_is_named(wrong):
    with pytest.raises(TypeError, match=r"`x` must be a torch\.Tensor"):
        NonLocalBlock(6)(wrong)


def test_parameters_of_bfloat16_arrays_are_taken_in():
    block = NonLocalBlock(6)
    given = {name: a.astype(ml_dtypes.bfloat16) for name, a in NonLocalBlock(6).export_params().items()}
    block.import_params(given)
    assert all(np.array_equal(a, given[name].astype("float32")) for name, a in block.export_params().items())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"g.bias": [0.0, 0.0, 0.0]}, TypeError, r"`params\['g.bias'\]` must be an array. Got list"),
        ({"g.bias": np.ones(3, int)}, TypeError, r"`params\['g.bias'\]` must have a floating-point dtype. Got int64"),
        ({"g.bias": np.ones(3, complex)}, TypeError, "must have a floating-point dtype. Got complex128"),
    ],
)
def test_parameters_of_a_wrong_type_are_named(change, error, words):
    block = NonLocalBlock(6)
    with pytest.raises(error, match=words):
        block.import_params({**block.export_params(), **change})


@pytest.mark.parametrize("name", ["theta", "phi", "g", "key_mask"])
def test_an_array_of_another_library_is_refused_by_the_operation(name):
    arrays = {"theta": torch.ones(1, 2, 4), "phi": torch.ones(1, 3, 4), "g": torch.ones(1, 3, 4)}
    arrays["key_mask"] = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(TypeError, match=f"^`{name}` must be a torch.Tensor. Got shape .* of type ndarray"):
        nonlocal_op(**{**arrays, name: arrays[name].numpy()})


@pytest.mark.parametrize("x", [None, [1.0], np.ones((2, 4, 5), np.float32)], ids=["None", "list", "array"])
def test_an_input_that_is_no_tensor_is_refused(x):
    with pytest.raises(TypeError, match=r"^`x` must be a torch\.Tensor\. Got "):
        NonLocalBlock(4)(x)


@pytest.mark.parametrize("place", ["projection", "input"])
def test_a_window_whose_valid_values_are_all_infinitely_small_is_pooled_to_just_that(place):
    block = NonLocalBlock(1, pairwise="dot_product", scale=1e-30, subsample=2, subsample_at=place)
    block.import_params(
        {name: np.full(a.shape, float(name[-6:] == "weight")) for name, a in block.export_params().items()}
    )
    x, mask = np.ones((1, 4, 1), "float32"), np.array([[True, False, True, True]])
    x[0, 0] = -np.inf
    expected = nlc.attention(x, block.export_params(), block.spec, [2], mask)
    assert expected[0, 0, 0] == -np.inf
    rows = block.attention(torch.from_numpy(x).mT, [2], torch.from_numpy(mask))
    np.testing.assert_array_equal(rows.detach().numpy(), expected)


def test_a_mask_of_another_library_is_refused():
    with pytest.raises(TypeError, match=r"`key_mask` must be a torch.Tensor. Got shape \(2, 5\) of type ndarray"):
        NonLocalBlock(4)(torch.zeros(2, 4, 5), np.ones((2, 5), bool))
