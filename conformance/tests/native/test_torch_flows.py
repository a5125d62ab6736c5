"""Blocks where a network is channels last inside, and where its modules return more than one tensor."""

import copy
import pickle
from typing import NamedTuple

import pytest
import torch
from torch import nn

import nonlocal_core as nlc
from nonlocal_torch import attention_of, insert_nonlocal, remove_nonlocal

X = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))


class Inside(nn.Module):
    """A network that is channels last inside, as a stage of a Swin is."""

    def __init__(self, tokens):
        super().__init__()
        self.stem, self.stage, self.tokens = nn.Conv2d(3, 6, 2, stride=2), nn.Linear(6, 6), tokens

    def forward(self, x):
        x = self.stem(x).movedim(1, -1)
        return self.stage(x.flatten(1, 2) if self.tokens else x)


def filled(model):
    """Return the model with blocks that add something."""
    for name, parameter in model.named_parameters():
        if "nonlocal_block" in name:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    return model.eval()


@pytest.mark.parametrize("tokens", [False, True])
def test_a_network_that_is_channels_last_inside_takes_blocks_along_its_positions(tokens):
    model = Inside(tokens).eval()
    plain = copy.deepcopy(model)
    (insertion,) = insert_nonlocal(model, ["stage"], example_input=X, data_format="channels_last", subsample=2)
    assert insertion.shape == ((2, 24, 6) if tokens else (2, 4, 6, 6))
    assert torch.equal(model(X), plain(X))
    block, flow = filled(model).stage.nonlocal_block, plain(X).detach()
    expected = nlc.nonlocal_block(flow.numpy(), block.export_params(), insertion.spec)
    torch.testing.assert_close(model(X).detach(), torch.from_numpy(expected))
    rows = nlc.attention(flow.numpy(), block.export_params(), insertion.spec, [5])
    torch.testing.assert_close(torch.from_numpy(attention_of(model, X, positions=[5]).weights), torch.from_numpy(rows))


@pytest.mark.parametrize("tokens", [False, True])
def test_an_axis_whose_size_follows_that_of_the_input_is_not_taken_for_channels(tokens):
    model, got = Inside(tokens), "24 after 'stage', and 6" if tokens else "4 after 'stage', and 2"
    words = rf"`data_format` must name the axis of the channels.* Got 'channels_first', where it has size {got}"
    with pytest.raises(ValueError, match=words):
        insert_nonlocal(model, ["stage"], example_input=X)
    assert not hasattr(model.stage, "nonlocal_block")


def test_a_network_that_takes_one_size_alone_takes_blocks():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Flatten(2), nn.Linear(96, 96))
    (insertion,) = insert_nonlocal(model, ["2"], example_input=X)
    assert insertion.shape == (2, 96, 6)


class Pair(NamedTuple):
    features: torch.Tensor
    mask: torch.Tensor


RETURNED = {
    "tuple": (lambda y, mask: (mask, y), 1),
    "negative": (lambda y, mask: (mask, y), -1),
    "list": (lambda y, mask: [y, mask], 0),
    "named": (Pair, 0),
    "dict": (lambda y, mask: {"mask": mask, "features": y}, "features"),
}


class Several(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.conv, self.kind = nn.Conv2d(3, 6, 1), kind

    def forward(self, x):
        return RETURNED[self.kind][0](self.conv(x), x > 0)


@pytest.mark.parametrize("kind", RETURNED)
def test_one_of_several_outputs_passes_through_the_block(kind):
    model, key = nn.Sequential(Several(kind)), RETURNED[kind][1]
    plain = model(X)
    (insertion,) = insert_nonlocal(model, ["0"], example_input=X, output=key)
    assert insertion.shape == (2, 8, 12, 6)
    block, found = filled(model)[0].nonlocal_block, model(X)
    assert type(found) is type(plain)
    assert torch.equal(found[key], block(plain[key]))
    assert not torch.allclose(found[key], plain[key])
    other = {0: 1, 1: 0, -1: 0, "features": "mask"}[key]
    assert torch.equal(found[other], plain[other])
    twin = pickle.loads(pickle.dumps(model))  # noqa: S301 - our own bytes
    assert torch.equal(twin(X)[key], found[key])
    remove_nonlocal(model)
    assert torch.equal(model(X)[key], plain[key])


@pytest.mark.parametrize(
    ("kind", "output", "words"),
    [
        ("tuple", 2, "Got 2, where 'stage' returns a tuple of 2"),
        ("tuple", "features", "Got 'features', where 'stage' returns a tuple of 2"),
        ("dict", 0, r"Got 0, where 'stage' returns the keys \['mask', 'features'\]"),
    ],
)
def test_an_output_that_is_not_there_is_refused(kind, output, words):
    model = nn.Sequential()
    model.add_module("stage", Several(kind))
    with pytest.raises(ValueError, match=f"`output` must be an index or a key of what the modules return. {words}"):
        insert_nonlocal(model, ["stage"], example_input=X, output=output)


def test_one_tensor_is_no_row_of_outputs():
    with pytest.raises(ValueError, match="Got 0, where '0' returns a Tensor"):
        insert_nonlocal(nn.Sequential(nn.Conv2d(3, 6, 1)), ["0"], example_input=X, output=0)


def test_a_plain_sequential_is_no_place_for_one_output():
    model = nn.Sequential(nn.Sequential(Several("tuple")))
    with pytest.raises(
        ValueError, match=r"`after` must name no plain Sequential .* Got '0'; name the last module in it"
    ):
        insert_nonlocal(model, ["0"], example_input=X, output=1)
    assert not hasattr(model[0], "nonlocal_block")
