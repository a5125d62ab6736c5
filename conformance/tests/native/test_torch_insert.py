"""Blocks in PyTorch networks: put in, found, looked at, taken out, and the network as it was in all else."""

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import ResNetConfig, ResNetForImageClassification, ResNetModel

import nonlocal_core as nlc
from nonlocal_torch import NonLocalBlock, attention_of, check_identity, insert_nonlocal, remove_nonlocal

SAVED = Path(__file__).parent / "saved" / "torch.pt"
DEPTHS, WIDTHS = (3, 4, 6, 3), (4, 6, 8, 10)
PLACES = ["layer2.1", "layer2.3", "layer3.1", "layer3.3", "layer3.5"]


@pytest.fixture(autouse=True)
def _one_thread():
    """Compute in one thread: arrays this small only wait for other threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Residual(nn.Module):
    def __init__(self, entering, leaving, rank):
        super().__init__()
        convolution = {2: nn.Conv2d, 3: nn.Conv3d}[rank]
        self.conv1 = convolution(entering, leaving, 3, padding=1)
        self.bn1 = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[rank](leaving)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = convolution(entering, leaving, 1)

    def forward(self, x):
        return self.relu(self.bn1(self.conv1(x)) + self.downsample(x))


def stages(rank=2):
    """Return the residual blocks of the four stages."""
    entering = (3, *WIDTHS)
    return [
        [Residual(entering[stage + (block > 0)], WIDTHS[stage], rank) for block in range(DEPTHS[stage])]
        for stage in range(4)
    ]


class Torchvision(nn.Module):
    """The names of torchvision's and timm's ResNets."""

    def __init__(self):
        super().__init__()
        self.layer1, self.layer2, self.layer3, self.layer4 = (nn.Sequential(*blocks) for blocks in stages())
        self.fc = nn.Linear(WIDTHS[-1], 5)

    def forward(self, x):
        return self.fc(self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3)))


class Stage(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.res_blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.res_blocks:
            x = block(x)
        return x


class Pytorchvideo(nn.Module):
    """The names of pytorchvideo's ResNets."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity(), *(Stage(blocks) for blocks in stages(rank=3)), nn.Flatten(2)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def network(kind=Torchvision, training=True):
    torch.manual_seed(0)
    return kind().train(training)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


IMAGES, CLIPS = random(2, 3, 5, 7), random(2, 3, 2, 3, 5)


def state_of(model):
    """Return a copy of all that a run may change: parameters and statistics, modes, and the random state."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        {name: module.training for name, module in model.named_modules()},
        {name: list(module._forward_hooks) for name, module in model.named_modules()},  # noqa: SLF001 - no public way
        torch.get_rng_state(),
    )


def randomised(model):
    """Return the model with other parameters in its blocks, so that they are no longer the identity."""
    for module in model.modules():
        if isinstance(module, NonLocalBlock):
            for seed, parameter in enumerate(module.parameters()):
                parameter.data = random(*parameter.shape, seed=seed, dtype=parameter.dtype)
    return model


# Insertion


def test_what_follows_sees_what_the_blocks_give():
    plain, model = network(training=False), network(training=False)
    insert_nonlocal(model, ["layer2.1", "layer4"], example_input=IMAGES)
    randomised(model)
    x = plain.layer2[1](plain.layer2[0](plain.layer1(IMAGES)))
    x = plain.layer2[3](plain.layer2[2](model.layer2[1].nonlocal_block(x)))
    x = model.layer4.nonlocal_block(plain.layer4(plain.layer3(x)))
    assert torch.equal(model(IMAGES), plain.fc(x.mean((2, 3))))


@pytest.mark.parametrize(
    ("kind", "x", "places"),
    [
        (Torchvision, IMAGES, PLACES),
        (Pytorchvideo, CLIPS, [f"blocks.{s}.res_blocks.{b}" for s, b in [(2, 1), (2, 3), (3, 1), (3, 3), (3, 5)]]),
    ],
)
def test_a_recipe_finds_its_places(kind, x, places):
    model = network(kind)
    insertions = insert_nonlocal(model, nlc.recipes.positions(50, 5), example_input=x, subsample=2, axes="all")
    assert [insertion.after for insertion in insertions] == places
    spatial, channels = x.shape[2:], [6, 6, 8, 8, 8]
    assert [insertion.shape for insertion in insertions] == [(2, *spatial, c) for c in channels]
    assert [insertion.spec for insertion in insertions] == [nlc.NonLocalSpec(channels=c, subsample=2) for c in channels]
    blocks = [model.get_submodule(insertion.name) for insertion in insertions]
    assert [sum(p.numel() for p in block.parameters()) for block in blocks] == [i.parameters for i in insertions]


def test_a_network_under_two_names_serves_a_recipe_and_either_name():
    model = network()
    model.backbone = model.layer3
    assert len(insert_nonlocal(model, nlc.recipes.positions(50, 1), example_input=IMAGES)) == 1
    (insertion,) = insert_nonlocal(model, ["backbone.5"], example_input=IMAGES)
    assert model.get_submodule(insertion.name) is model.layer3[5].nonlocal_block


def test_the_papers_blocks_in_a_resnet_50_have_7_36_million_parameters():
    with torch.device("meta"):
        model = ResNetModel(ResNetConfig())
        x = torch.empty(2, 3, 224, 224)
    insertions = insert_nonlocal(model, nlc.recipes.positions(50, 5), example_input=x, norm="batch", subsample=2)
    assert [i.after for i in insertions] == [
        f"encoder.stages.{s}.layers.{b}" for s, b in [(1, 1), (1, 3), (2, 1), (2, 3), (2, 5)]
    ]
    assert [i.shape for i in insertions] == [(2, 28, 28, 512)] * 2 + [(2, 14, 14, 1024)] * 3
    assert round(sum(i.parameters for i in insertions) / 1e6, 2) == 7.36
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_network_of_transformers_takes_blocks():
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8, 12, 16], depths=[3, 4, 6, 3], num_labels=5)
    torch.manual_seed(0)
    model = ResNetForImageClassification(config).train()
    x = {"pixel_values": random(2, 3, 40, 56)}
    plain = copy.deepcopy(model)
    insert_nonlocal(model, nlc.recipes.positions(50, 10), example_input=x, norm="batch")
    assert torch.equal(model(**x).logits, plain(**x).logits)
    found = attention_of(randomised(model), x, block="resnet.encoder.stages.2.layers.3", positions=[3, 1])
    assert found.sizes == (3, 4)
    np.testing.assert_allclose(found.weights.sum(axis=-1), 1, rtol=1e-5)


@pytest.mark.parametrize("example_input", [IMAGES, (IMAGES,), {"x": IMAGES}], ids=["tensor", "tuple", "dict"])
def test_the_example_may_be_a_tensor_a_tuple_or_a_dict(example_input):
    (insertion,) = insert_nonlocal(network(), ["layer2.1"], example_input=example_input)
    assert insertion.shape == (2, 5, 7, 6)


def test_a_block_has_the_dtype_and_the_mode_of_its_place_and_the_method_that_was_asked_for():
    model = network().double()
    model.layer2.eval()
    insert_nonlocal(model, ["layer2.1", "layer3.1"], example_input=IMAGES.double(), method="streamed")
    blocks = model.layer2[1].nonlocal_block, model.layer3[1].nonlocal_block
    assert [{p.dtype for p in block.parameters()} for block in blocks] == [{torch.float64}] * 2
    assert [block.training for block in blocks] == [False, True]
    assert [block.method for block in blocks] == ["streamed"] * 2


def test_under_autocast_a_block_has_the_dtype_of_the_parameters():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU())
    with torch.autocast("cpu", torch.bfloat16):
        insert_nonlocal(model, ["1"], example_input=IMAGES)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_an_optimiser_trains_the_blocks():
    model = network()
    insert_nonlocal(model, PLACES, example_input=IMAGES)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model(IMAGES).square().sum().backward()
    optimiser.step()
    assert all(model.get_submodule(place).nonlocal_block.out.weight.all() for place in PLACES)
    with pytest.raises(ValueError, match=r"out\.weight of 'layer2\.1\.nonlocal_block'"):
        check_identity(model)


def test_the_backbones_weights_still_load():
    plain, model = network(), network()
    insert_nonlocal(model, PLACES, example_input=IMAGES, norm="batch")
    nn.init.zeros_(model.layer1[0].conv1.weight)
    result = model.load_state_dict(plain.state_dict(), strict=False)
    assert result.unexpected_keys == []
    names = set(NonLocalBlock(6, norm="batch").state_dict()) - {"norm.num_batches_tracked"}  # PyTorch can do without
    assert set(result.missing_keys) == {f"{place}.nonlocal_block.{name}" for place in PLACES for name in names}
    assert torch.equal(model.eval()(IMAGES), plain.eval()(IMAGES))


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],  # noqa: S301 - our own bytes
    ids=["deepcopy", "pickle"],
)
def test_a_copy_has_blocks_of_its_own(copied):
    model = network(training=False)
    insert_nonlocal(model, ["layer2.1", "layer3"], example_input=IMAGES)
    expected = randomised(model)(IMAGES)
    twin = copied(model)
    assert torch.equal(twin(IMAGES), expected)
    remove_nonlocal(model)
    assert torch.equal(twin(IMAGES), expected)
    remove_nonlocal(twin)
    assert torch.equal(twin(IMAGES), model(IMAGES))
    assert not torch.allclose(twin(IMAGES), expected, rtol=0.1)


def test_a_hook_registered_in_another_process_does_not_replace_a_block(monkeypatch):
    model = network(training=False)
    insert_nonlocal(model, ["layer2.1"], example_input=IMAGES)
    expected, (number,) = randomised(model)(IMAGES), model.layer2[1]._forward_hooks  # noqa: SLF001 - no public way
    stored = pickle.dumps(model)
    monkeypatch.setattr(RemovableHandle, "next_id", number)  # as where fewer hooks have been registered
    loaded = pickle.loads(stored)  # noqa: S301 - our own bytes
    loaded.layer2[1].register_forward_hook(lambda *_: None)
    assert torch.equal(loaded(IMAGES), expected)


def test_a_network_saved_by_an_earlier_layout_of_the_package_still_loads():
    # `torch.save` of the whole module, which names classes and the hook by their old places.
    model, x = torch.load(SAVED, weights_only=False), random(2, 2, 5, 7)
    convolution, last = copy.deepcopy(model[0]), model[2]
    remove_nonlocal(convolution)

    def through(block, x):
        z = nlc.nonlocal_block(x.movedim(1, -1).numpy(), block.export_params(), block.spec)
        return torch.from_numpy(z).movedim(-1, 1)

    with torch.no_grad():
        flow = through(model[0].nonlocal_block, convolution(x))
        flow = through(model[1].nonlocal_block, flow.relu())
        torch.testing.assert_close(model(x), last(flow))
    assert attention_of(model, x, "0", positions=[3]).weights.shape == (2, 1, 6)
    remove_nonlocal(model)
    with torch.no_grad():
        assert torch.equal(model(x), last(convolution(x).relu()))


def test_blocks_taken_out_leave_nothing_behind():
    model = network()
    before, expected = state_of(model), copy.deepcopy(model)(IMAGES)
    rng = torch.get_rng_state()
    insert_nonlocal(model, [*PLACES, "layer4"], example_input=IMAGES, norm="batch")
    remove_nonlocal(randomised(model))
    torch.set_rng_state(rng)
    after = state_of(model)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert list(after[0]) == list(before[0])
    assert [vars(module).keys() for module in model.modules()] == [vars(m).keys() for m in network().modules()]
    assert torch.equal(model(IMAGES), expected)
    assert len(insert_nonlocal(model, PLACES, example_input=IMAGES)) == 5


def test_only_inserted_blocks_are_taken_out():
    model = nn.Sequential()
    model.add_module("conv", nn.Conv2d(3, 6, 1))
    model.add_module("nonlocal_block", NonLocalBlock(6))
    insert_nonlocal(model, ["conv"], example_input=IMAGES)
    remove_nonlocal(model)
    assert [name for name, _ in model.named_modules() if name.count(".") == 0] == ["", "conv", "nonlocal_block"]
    with pytest.raises(ValueError, match=r"`model` must have at least one inserted non-local block\. Got none"):
        remove_nonlocal(model)


def test_a_place_gets_another_block_by_its_name():
    model = network(training=False)
    insert_nonlocal(model, ["layer3.5"], example_input=IMAGES, norm="batch")
    block = randomised(model).layer3[5].nonlocal_block
    expected = model(IMAGES)
    model.layer3[5].nonlocal_block = block.fold_norm()
    torch.testing.assert_close(model(IMAGES), expected)
    assert "layer3.5.nonlocal_block.norm.weight" not in model.state_dict()


# What is refused


class Odd(nn.Module):
    """Modules that are no places, or in the wrong way."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 1)
        self.twice, self.never, self.listed = nn.ReLU(), nn.ReLU(), nn.ModuleList([nn.Identity()])
        self.alias = self.conv
        self.pooled = nn.AdaptiveMaxPool2d(2, return_indices=True)
        self.looping = Looping({"first": nn.ReLU(), "second": nn.ReLU()})
        self.own = OwnSequential(nn.ReLU(), nn.ReLU())
        self.branches = nn.ModuleList([nn.Identity(), nn.Identity()])
        self.counted = nn.ModuleList([nn.Identity()])
        self.digit, self.flat, self.plain = Digit(), nn.Flatten(), nn.Flatten(0)

    def forward(self, x):
        x = self.twice(self.twice(self.listed[0](self.conv(x))))
        x = self.own(self.looping(x))
        x = sum(branch(x) for branch in self.branches) / 2
        x = self.counted[range(len(self.counted))[-1]](x)
        return self.pooled(x), self.digit(x), self.flat(x), self.plain(x)


class Digit(nn.Module):
    def forward(self, x):
        return x.round().long()


class Looping(nn.ModuleDict):
    def forward(self, x):
        for module in self.values():
            x = module(x)
        return x


class OwnSequential(nn.Sequential):
    def forward(self, x):
        return self[1](self[0](x))


FLOW = "`after` must give one floating-point array of 3 to 5 axes. Got "
ONCE = "`after` must be passed once in a run of the network. Got "


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (["twice"], f"{ONCE}'twice', passed 2 times"),
        (["never"], f"{ONCE}'never', passed 0 times"),
        (["listed"], f"{ONCE}'listed', passed 0 times"),
        (["branches"], f"{ONCE}'branches', passed 0 times"),
        (["counted"], f"{ONCE}'counted', passed 0 times"),
        (
            ["looping"],
            "`after` must be no module that loops over those in it.* Got 'looping'; name the last",
        ),
        (["pooled"], f"{FLOW}'pooled', which gives tuple"),
        (["digit"], f"{FLOW}'digit', which gives int64 of shape (2, 6, 5, 7)"),
        (["flat"], f"{FLOW}'flat', which gives float32 of shape (2, 210)"),
        (["plain"], f"{FLOW}'plain', which gives float32 of shape (420,)"),
        (["conv", "alias"], "`after` must have no block yet. Got 'alias', which has one"),
        ({"res4": [1]}, "`after` must be names, since stages are known in one ResNet"),
    ],
)
def test_a_wrong_place_is_named_and_nothing_changes(after, words):
    model = Odd()
    before = state_of(model)
    with pytest.raises(ValueError, match=f"^{words.translate({ord(c): chr(92) + c for c in '[]();'})}"):
        insert_nonlocal(model, after, example_input=IMAGES)
    torch.testing.assert_close(state_of(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("place", ["own", "own.1"])
def test_a_sequential_with_a_forward_of_its_own_takes_a_block(place):
    plain, model = Odd().own, Odd()
    insert_nonlocal(model, [place], example_input=IMAGES)
    x = random(2, 6, 5, 7)
    block = randomised(model).get_submodule(place).nonlocal_block
    assert torch.equal(model.own(x), block(plain(x)))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"method": "sorted"}, ValueError, "`method` must be 'auto', 'pairwise' or 'streamed'"),
        ({"channels": 6}, TypeError, "`channels` must be an option of insert_nonlocal"),
        ({"subsampel": 2}, TypeError, "`subsampel` must be an option of insert_nonlocal"),
        ({"example_input": random(2, 5, 5, 7)}, RuntimeError, "expected input.* to have 3 channels"),
    ],
)
def test_what_fails_leaves_the_network_as_it_was(options, error, words):
    model = network()
    before = state_of(model)
    with pytest.raises(error, match=words):
        insert_nonlocal(model, **{"after": ["layer2.1", "layer4"], "example_input": IMAGES} | options)
    after = state_of(model)
    torch.testing.assert_close(after[:3], before[:3], rtol=0, atol=0)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: insert_nonlocal(model, ["0"], example_input=IMAGES),
        remove_nonlocal,
        check_identity,
        lambda model: attention_of(model, IMAGES),
    ],
)
def test_a_model_that_is_no_module_is_refused(call):
    with pytest.raises(TypeError, match=r"`model` must be a torch.nn.Module. Got 3 of type int"):
        call(3)


# The trial run


class Noisy(nn.Module):
    """A network that draws in evaluation too, and does more in `train` than to set the flag."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Identity()
        self.calls = 0

    def forward(self, x):
        return self.head(self.norm(self.conv(x)) + torch.rand(1)), self.training, torch.is_grad_enabled()

    def train(self, mode=True):
        self.calls += 1
        return super().train(mode)


@pytest.mark.parametrize(
    "run",
    [
        lambda model: attention_of(model, IMAGES, positions=[3]),
        lambda model: insert_nonlocal(model, ["head"], example_input=IMAGES, group_size=3),
    ],
    ids=["attention", "insertion"],
)
def test_a_trial_run_is_in_evaluation_and_leaves_no_trace(run):
    model = Noisy()
    model.conv = nn.Sequential(nn.Conv2d(3, 6, 1), NonLocalBlock(6))
    model.norm.eval()
    before, seen = state_of(model), []
    handle = model.register_forward_hook(lambda _module, _inputs, output: seen.append(output[1:]))
    try:
        run(model)
    except ValueError as error:
        assert "spatial axes" in str(error)  # noqa: PT017 - what an insertion that fails leaves is compared
    handle.remove()
    torch.testing.assert_close(state_of(model), before, rtol=0, atol=0)
    assert set(seen) == {(False, False)}
    assert model.calls == 0


# Identity


@pytest.mark.parametrize(
    ("kinds", "norm", "named"),
    [
        ((nn.Conv2d, nn.Linear), None, "out.weight"),
        ((nn.modules.batchnorm._BatchNorm,), "batch", "norm.weight"),  # noqa: SLF001 - what several hosts look for
    ],
)
def test_a_host_that_initialises_again_is_noticed(kinds, norm, named):
    model = network()
    insert_nonlocal(model, PLACES[:2], example_input=IMAGES, norm=norm)

    def again(module):
        if isinstance(module, kinds):
            nn.init.ones_(module.weight) if norm else nn.init.kaiming_normal_(module.weight)

    model.apply(again)
    with pytest.raises(
        ValueError, match=rf"{named} of 'layer2\.1\.nonlocal_block', {named} of 'layer2\.3\.nonlocal_block'"
    ):
        check_identity(model)


# Attention


class Masked(nn.Module):
    """A network that gives its block a mask, and keeps what enters the block."""

    def __init__(self, keyword, **options):
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 6, 3), NonLocalBlock(6, zero_init=False, **options)
        self.keyword, self.entered = keyword, None

    def forward(self, x, shown):
        self.entered = self.stem(x)
        return self.block(self.entered, key_mask=shown) if self.keyword else self.block(self.entered, shown)


@pytest.mark.parametrize("keyword", [True, False])
@pytest.mark.parametrize("pairwise", ["embedded_gaussian", "dot_product"])
def test_rows_are_those_of_the_block_on_what_entered_it_under_its_mask(keyword, pairwise):
    torch.manual_seed(0)
    model = randomised(Masked(keyword, pairwise=pairwise, subsample=(1, 2)))
    shown = torch.ones(2, 3, 5, dtype=torch.bool)
    shown[0, :, 2:], shown[1, 1] = False, False
    found = attention_of(model, (IMAGES, shown), positions=[7, 2])
    with torch.no_grad():  # with gradients some products are made in another order
        expected = model.block.attention(model.entered, [7, 2], shown)
        unmasked = model.block.attention(model.entered, [7, 2])
    np.testing.assert_array_equal(found.weights, expected.numpy())
    assert (found.sizes, found.positions.tolist(), found.spec) == ((3, 5), [7, 2], model.block.spec)
    assert np.count_nonzero(found.weights[0], axis=-1).tolist() == [3, 3]
    assert not np.allclose(found.weights, unmasked.numpy(), rtol=0.1)


def test_attention_of_bfloat16_is_given_as_float32():
    block = NonLocalBlock(3, dtype=torch.bfloat16)
    found = attention_of(block, IMAGES.bfloat16(), positions=[1])
    assert found.weights.dtype == np.float32
    with torch.no_grad():
        expected = block.attention(IMAGES.bfloat16(), [1]).float()
    np.testing.assert_array_equal(found.weights, expected.numpy())


def test_a_block_that_runs_twice_is_refused():
    block = NonLocalBlock(3)
    model = nn.Sequential(block, block)
    with pytest.raises(
        ValueError, match=r"`block` must be passed once in a run of the network\. Got '0', passed 2 times"
    ):
        attention_of(model, IMAGES, positions=[0])


class Overwriting(nn.Module):
    """A network that writes over what entered its block."""

    def __init__(self):
        super().__init__()
        self.block = NonLocalBlock(3)

    def forward(self, x):
        entered = x * 1
        z = self.block(entered)
        return entered.zero_() + z


def test_attention_is_that_of_what_entered_even_if_the_network_writes_over_it():
    model = randomised(Overwriting().eval())
    with torch.no_grad():
        expected = model.block.attention(IMAGES, [3])
    np.testing.assert_array_equal(attention_of(model, IMAGES, positions=[3]).weights, expected.numpy())


def test_a_place_in_bfloat16_takes_a_block():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU()).bfloat16()
    (insertion,) = insert_nonlocal(model, ["0"], example_input=IMAGES.bfloat16())
    assert {a.dtype for a in model[0].nonlocal_block.parameters()} == {torch.bfloat16}
    assert insertion.spec.channels == 6
