"""What tools hang on the layers of a block, or put in their place, acts: in each call, and in what is exported."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.utils.flop_counter import FlopCounterMode
from torch_blocks import random, random_block

import nonlocal_core as nlc
from nonlocal_torch import NonLocalBlock, check_identity

SHAPE = (2, 6, 5, 7)


class Adapted(nn.Module):
    """A layer with a trained addition of low rank, wrapped as PEFT does it."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(requires_grad=False)
        self.lora_a = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.lora_b = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)
        self.drop = nn.Dropout(0.5)

    def forward(self, a):
        return self.base(a) + self.lora_b(self.lora_a(self.drop(a)))


def parametrised(tool):
    return lambda block, name: tool(block.get_submodule(name))


def pruned(block, name):
    prune.l1_unstructured(block.get_submodule(name), "weight", amount=0.4)


def adapted(block, name):
    setattr(block, name, Adapted(block.get_submodule(name)))


def patched(block, name):
    layer = block.get_submodule(name)
    layer.forward = lambda a: nn.functional.linear(a, 2 * layer.weight, layer.bias)


def doubled(block, name):
    class Doubled(nn.Linear):
        def forward(self, a):
            return 2 * super().forward(a)

    layer = copy.copy(block.get_submodule(name))
    layer.__class__ = Doubled
    setattr(block, name, layer)


def hooked(block, name):
    block.get_submodule(name).register_forward_hook(lambda _layer, _args, z: 2 * z)


TOOLS = {
    "spectral norm by a hook": parametrised(spectral_norm),
    "spectral norm": parametrised(parametrizations.spectral_norm),
    "weight norm by a hook": parametrised(weight_norm),
    "weight norm": parametrised(parametrizations.weight_norm),
    "pruning": pruned,
    "low rank": adapted,
    "a function in place of forward": patched,
    "a class of its own": doubled,
    "a hook that changes the result": hooked,
}
FORMS = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
old_weight_norm = pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
every_tool = pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)


def plain(block):
    """Return a block without tools that computes what this one exports."""
    twin = NonLocalBlock.from_spec(block.spec, dtype=torch.float64)
    twin.import_params(block.export_params())
    return twin.eval()


def biased(pairwise):
    return {"pairwise": pairwise, "bias": {"concat": True} if pairwise == "concatenation" else {}}


@old_weight_norm
@every_tool
@pytest.mark.parametrize("pairwise", FORMS)
def test_what_is_hung_on_layers_acts_trains_and_is_exported(tool, pairwise):
    torch.manual_seed(0)
    block, x = random_block(norm="batch", subsample=2, **biased(pairwise)), random(*SHAPE)
    for layer in block.spec.layers:
        tool(block, layer)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.01)
    for _ in range(2):
        z = block.eval()(x)
        torch.testing.assert_close(plain(block)(x), z, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(plain(block).attention(x, [3, 1]), block.attention(x, [3, 1]))
        torch.testing.assert_close(block.fold_norm()(x), z, rtol=1e-10, atol=1e-10)
        optimizer.zero_grad()
        block.train()(x).square().sum().backward()
        trained = {name: p.grad for name, p in block.named_parameters() if p.requires_grad}
        # A bias of phi adds the same to all scores of a query, which a softmax takes off again.
        assert [name for name, d in trained.items() if d is None or not (d.any() or "phi" in name)] == []
        optimizer.step()
        assert (block.eval()(x) - z).abs().max() > 1e-3


@pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated:DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning"
)
@pytest.mark.parametrize("pairwise", FORMS)
def test_quantised_layers_are_called_and_exported(pairwise):
    block, x = random_block(torch.float32, norm="batch", **biased(pairwise)).eval(), random(*SHAPE).float()
    quantised = torch.ao.quantization.quantize_dynamic(block, {nn.Linear})
    assert type(quantised.out) is not nn.Linear
    z, r = quantised(x), block(x) - x
    assert 0 < (z - block(x)).abs().max() < 0.05 * r.abs().max()
    assert (quantised.attention(x) - block.attention(x)).abs().max() < 0.05
    exported = quantised.export_params()
    for layer in block.spec.layers:
        weight = quantised.get_submodule(layer).weight().dequantize().numpy()
        np.testing.assert_allclose(exported[f"{layer}.weight"].reshape(weight.shape), weight, rtol=1e-6, atol=1e-6)


def test_the_whole_of_a_pruned_state_acts_and_is_exported_before_any_call():
    block, other, x = random_block(), random_block(), random(*SHAPE)
    for one, amount in ((block, 0.5), (other, 0.1)):
        for layer in ("theta", "out"):
            prune.l1_unstructured(one.get_submodule(layer), "weight", amount=amount)
    other.load_state_dict(block.state_dict())
    assert all(np.array_equal(a, block.export_params()[name]) for name, a in other.export_params().items())
    assert torch.equal(other(x), block(x))


def test_a_pruned_norm_is_exported_as_it_acts():
    block, x = random_block(norm="batch").eval(), random(*SHAPE)
    prune.l1_unstructured(block.norm, "weight", amount=0.5)
    assert np.count_nonzero(block.export_params()["norm.weight"]) == 3
    torch.testing.assert_close(plain(block)(x), block(x))


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("change", ["a hook", "a class of its own"])
@pytest.mark.parametrize("kind", ["batch", "affine"])
def test_a_norm_that_computes_something_else_than_its_parameters_say_is_called_and_not_read(kind, change, factor):
    block, x = random_block(norm=kind, residual=False).eval(), random(*SHAPE)
    params, z, own = block.export_params(), block(x), type(block.norm)
    if change == "a hook":
        block.norm.register_forward_hook(lambda _layer, _args, r: factor * r)
    else:
        forward = {"forward": lambda norm, a: factor * own.forward(norm, a)}
        block.norm.__class__ = type("Another", (own,), forward)
    torch.testing.assert_close(block(x), factor * z)
    if factor == 1:
        assert all(np.array_equal(a, params[name]) for name, a in block.export_params().items())
        return
    for read in (block.export_params, block.fold_norm):
        with pytest.raises(ValueError, match=r"`norm` must compute what its parameters say, to be read\. Got "):
            read()


def test_the_export_of_a_spectral_norm_in_training_leaves_its_state():
    block = random_block()
    parametrizations.spectral_norm(block.theta)
    state = copy.deepcopy(block.state_dict())
    block.export_params()
    assert all(torch.equal(a, state[name]) for name, a in block.state_dict().items())
    assert block.training
    assert block.theta.training


@old_weight_norm
@pytest.mark.parametrize("layer", ["theta", "concat", "out"])
@every_tool
def test_parameters_that_cannot_be_written_are_named_and_nothing_changes(tool, layer):
    block = random_block(pairwise="concatenation")
    given = {name: np.zeros_like(a) for name, a in block.export_params().items()}
    tool(block, layer)
    before = copy.deepcopy(list(block.state_dict().values()))
    words = f"`{layer}` must be a layer with a weight of its own, which nothing changes, to be written to. Got "
    for write in (lambda: block.import_params(given), block.reset_parameters):
        with pytest.raises(ValueError, match=words):
            write()
    assert all(map(torch.equal, before, block.state_dict().values()))


@every_tool
@old_weight_norm
def test_a_block_under_tools_is_the_identity_as_long_as_it_is(tool):
    block = NonLocalBlock(6, dtype=torch.float64, norm="affine", bias=False)
    tool(block, "theta")
    tool(block, "out")
    check_identity(block)
    nn.init.ones_(block.norm.weight)
    with pytest.raises(ValueError, match=r"other values in norm.weight of ''"):
        check_identity(block)


def test_a_wrapper_that_adds_a_bias_where_there_is_none_is_named():
    block = random_block(bias=False)
    block.g = nn.Sequential(nn.Linear(6, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"`g` must have no bias to be read, as `spec` says\. Got one that is not 0"):
        block.export_params()


@pytest.mark.parametrize("norm", [nn.Identity(), nn.GroupNorm(2, 6)], ids=["none", "groups"])
@pytest.mark.parametrize("kind", ["batch", "affine"])
def test_a_norm_of_another_kind_is_named(kind, norm):
    block = random_block(norm=kind)
    block.norm = norm
    with pytest.raises(ValueError, match=f"`norm` must have a .* to be read, as one of kind '{kind}' has. Got"):
        block.export_params()


# Hooks and counters


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # the input of `concat` requires no gradient
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("everywhere", [False, True], ids=["of the layer", "of all modules"])
def test_hooks_see_each_layer_once(kind, everywhere):
    block, x, seen = random_block(pairwise="concatenation", norm="affine"), random(*SHAPE), []
    layers = {module: name for name, module in block.named_children()}

    def look(module, *_):
        seen.append(layers.get(module))

    owner = nn.modules.module if everywhere else None
    register = f"register_module_{kind}_hook" if everywhere else f"register_{kind}_hook"
    handles = [getattr(owner or layer, register)(look) for layer in (layers if owner is None else [None])]
    try:
        block(x).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    assert sorted(filter(None, seen)) == sorted(layers.values())


def test_a_hook_changes_what_a_layer_gives_to_the_block_and_to_its_attention():
    block, x = random_block(), random(*SHAPE)
    weights, twin = block.attention(x), copy.deepcopy(block)
    block.theta.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    with torch.no_grad():
        twin.theta.weight.mul_(2)
        twin.theta.bias.mul_(2)
    torch.testing.assert_close((block(x), block.attention(x)), (twin(x), twin.attention(x)))
    assert (block.attention(x) - weights).abs().max() > 1e-3


def test_a_hook_that_only_looks_changes_no_bit_of_what_is_exported_or_taken_in():
    block, twin = random_block(), NonLocalBlock(6, dtype=torch.float64)
    params = block.export_params()
    for one in (block, twin):
        one.theta.register_forward_hook(lambda _layer, _args, _z: None)
    twin.import_params(block.export_params())
    assert all(np.array_equal(a, params[name]) for name, a in twin.export_params().items())


@pytest.mark.parametrize("subsample_at", [None, "projection", "input"])
@pytest.mark.parametrize("layer", ["theta", "phi", "concat"])
def test_one_layer_of_the_concatenation_is_called_among_others_that_are_folded(layer, subsample_at):
    pooled = {} if subsample_at is None else {"subsample": 2, "subsample_at": subsample_at}
    block, x = random_block(**biased("concatenation"), **pooled), random(*SHAPE)
    twin, results = copy.deepcopy(block), []
    doubled(block, layer)
    with torch.no_grad():
        for parameter in twin.get_submodule(layer).parameters():
            parameter.mul_(2)
    for one in (block, twin):
        z = one(x)
        results.append((z, torch.autograd.grad(z.square().sum(), list(one.parameters())), one.attention(x)))
    own = [name.startswith(layer) for name, _ in block.named_parameters()]
    z, gradients, rows = results[1]  # W stands for 2 W there, whose gradient is half of that of W here
    gradients = tuple(2 * d if is_own else d for d, is_own in zip(gradients, own, strict=True))
    torch.testing.assert_close(results[0], (z, gradients, rows))
    assert all(d.any() for d in gradients)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("hooked", [False, True])
def test_a_norm_without_momentum_weighs_every_batch_with_a_position_alike(hooked, masked):
    block, seen = random_block(norm="batch", residual=False), []
    block.norm = nn.BatchNorm1d(6, momentum=None, dtype=torch.float64)
    twin, plain = copy.deepcopy(block.norm), copy.deepcopy(block)
    plain.norm = nn.Identity()
    if hooked:
        for layer in (block.norm, block.out):
            layer.register_forward_hook(lambda layer, _args, _z: seen.append(layer))
    for seed in range(4):
        x, shown = random(*SHAPE, seed=seed), random(2, 5, 7, seed=seed) > (9 if seed == 1 else 0)
        shown = shown if masked else None
        z, r = (one(x, shown).movedim(1, -1) for one in (block, plain))
        counted = r.flatten(0, -2) if shown is None else r[shown]
        if len(counted):
            torch.testing.assert_close(z.flatten(0, -2) if shown is None else z[shown], twin(counted))
    torch.testing.assert_close(dict(block.norm.named_buffers()), dict(twin.named_buffers()))
    assert twin.num_batches_tracked == 4 - masked
    assert len(seen) == 8 * hooked


def test_flops_are_counted_by_layer():
    block, x = random_block(norm="batch"), random(*SHAPE)
    with FlopCounterMode(display=False) as counter:
        block(x)
    each = {name.rpartition(".")[2]: sum(found.values()) for name, found in counter.get_flop_counts().items()}
    assert {name: each[name] for name in block.spec.layers} == dict.fromkeys(block.spec.layers, 2 * 70 * 6 * 3)


# Kinds


@pytest.mark.parametrize("pairwise", FORMS)
@pytest.mark.parametrize("norm", [None, "batch", "affine"])
def test_every_module_with_parameters_is_of_a_kind_that_tools_know(norm, pairwise):
    kinds = (nn.Linear, nn.BatchNorm1d, nn.GroupNorm)
    assert all(isinstance(child, kinds) for child in NonLocalBlock(6, pairwise=pairwise, norm=norm).children())


def test_what_0_1_0_saved_loads():
    block = random_block(norm="affine", **biased("concatenation"))
    old = {name: a.reshape(nlc.param_shapes(block.spec)[name]) for name, a in block.state_dict().items()}
    assert old["concat.weight"].shape == (6,)
    twin = NonLocalBlock.from_spec(block.spec, dtype=torch.float64)
    nn.Sequential(twin).load_state_dict({f"0.{name}": a for name, a in old.items()})
    x = random(*SHAPE)
    assert torch.equal(twin(x), block(x))
    for layer in ("concat", "norm"):
        kinds = {name.partition(".")[2]: nn.Parameter(a) for name, a in old.items() if name.startswith(layer)}
        setattr(twin, layer, nn.ParameterDict(kinds))
    loaded = pickle.loads(pickle.dumps(twin))  # noqa: S301 - our own bytes
    assert [type(child) for child in loaded.children()] == [type(child) for child in block.children()]
    assert torch.equal(loaded(x), block(x))


# A module as the pairwise function


class PositionBias(nn.Module):
    """Scores of the embedded form with a learned number for every pair of positions."""

    def __init__(self, queries, keys):
        super().__init__()
        self.bias = nn.Parameter(random(queries, keys, seed=9))

    def forward(self, theta, phi):
        return theta @ phi.mT + self.bias


@pytest.mark.parametrize(("axes", "sizes"), [("all", (35, 6)), ((1,), (7, 3))], ids=str)
def test_a_pairwise_module_is_a_part_of_the_block(axes, sizes):
    given = PositionBias(*sizes)
    subsample = 2 if axes == "all" else (1, 2)
    block = random_block(pairwise=given, normalize="softmax", axes=axes, subsample=subsample)
    x = random(*SHAPE)
    block(x).square().sum().backward()
    assert given.bias.grad.any()
    assert block.state_dict()["pairwise.bias"].equal(given.bias)
    twin = copy.deepcopy(block)
    nn.init.zeros_(twin.pairwise.bias)
    assert (twin(x) - block(x)).abs().max() > 1e-6
    twin.load_state_dict(block.state_dict())
    torch.testing.assert_close(twin(x), block(x))
    assert block.float().pairwise.bias.dtype == torch.float32


@pytest.mark.parametrize(("axes", "sizes"), [("all", (35, 6)), ((1,), (7, 3)), ((0,), (5, 2))], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_the_attention_of_a_pairwise_module_is_what_the_block_sums_with(axes, sizes, masked):
    subsample = {"all": 2, (1,): (1, 2), (0,): (2, 1)}[axes]
    block = random_block(
        pairwise=PositionBias(*sizes), normalize="softmax", axes=axes, subsample=subsample, residual=False
    )
    block.spec = block.spec.replace(subsample_at="input")  # so that values are a product with the pooled input
    x, shown = random(*SHAPE), random(2, 5, 7) > -0.5 if masked else None
    weights = block.attention(x, key_mask=shown)
    filled = x if shown is None else x.masked_fill(~shown[:, None], -torch.inf)
    pooled = nn.functional.max_pool2d(filled, (subsample, subsample) if axes == "all" else subsample)
    pooled = pooled.masked_fill(pooled == -torch.inf, 0).flatten(2).mT
    y = weights @ block.g(pooled)
    torch.testing.assert_close(block(x, shown), block.out(y).mT.reshape(x.shape))
    torch.testing.assert_close(block.attention(x, [8, 2], shown), weights[:, [8, 2]])
