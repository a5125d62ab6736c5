"""Faults in networks: where a block is put, what it is given, what is left of it, and what is said of it."""
# ruff: noqa: ARG001 - many a fault is that an argument is ignored

import dataclasses

import numpy as np
import torch
from textbook import Textbook

from faulty import fault
from nonlocal_core.networks.insertion import check_identities
from nonlocal_core.spec.parameters import check_params


@fault("network_insert", "insertion")
def a_block_starts_with_random_weights(self, network, after, x, **options):
    """A network computes something else as soon as it has blocks."""
    return Textbook.network_insert(self, network, after, x, **{**options, "zero_init": False})


@fault("network_insert", "insertion")
def options_do_not_reach_the_blocks(self, network, after, x, **options):
    """Each is an embedded Gaussian with the defaults."""
    return Textbook.network_insert(self, network, after, x)


@fault("network_insert", "insertion")
def insertions_are_told_in_the_order_of_the_network(self, network, after, x, **options):
    """They do not come in the order that was asked for."""
    found = Textbook.network_insert(self, network, after, x, **options)
    return sorted(found, key=lambda one: list(network.layers).index(one.after))


@fault("new_block", "insertion")
def a_block_is_float32_in_every_network(self, spec, dtype):
    """It has not the dtype of its place."""
    return Textbook.new_block(self, spec, torch.float32)


@fault("network_insert", "insertion")
def an_insertion_initialises_the_network_again(self, network, after, x, **options):
    """What was trained is lost."""
    found = Textbook.network_insert(self, network, after, x, **options)
    network.layers["head"] = torch.randn_like(network.layers["head"])
    return found


@fault("flow", "inserted_blocks", "attention_in_a_network")
def a_block_stands_before_its_place(self, network, x, training=False):
    """It takes what enters the layer."""
    entering, flow = {}, self.input(x)
    for name, weight in network.layers.items():
        if name in network.blocks:
            entering[name] = flow
            flow = self.call(network.blocks[name], flow, None, training)
        flow = torch.tensordot(weight, flow.movedim(1, 0), 1).movedim(0, 1)
    return entering, flow


@fault("flow", "inserted_blocks")
def what_follows_does_not_see_what_a_block_gives(self, network, x, training=False):
    """Blocks hang on the network beside the stream."""
    bare = dataclasses.replace(network, blocks={})
    return Textbook.flow(self, network, x, training)[0], Textbook.flow(self, bare, x, training)[1]


@fault("network_load", "inserted_blocks")
def blocks_share_their_parameters(self, network, block, params):
    """What one takes in, all take in."""
    for name in self.places(network):
        Textbook.network_load(self, network, name, params)


@fault("network_insert", "inserted_blocks")
def another_insertion_makes_all_blocks_anew(self, network, after, x, **options):
    """Those that stand in the network lose what they have learned."""
    found = Textbook.network_insert(self, network, after, x, **options)
    for place, block in network.blocks.items():
        network.blocks[place] = self.new_block(block.spec, network.layers[place].dtype)
    return found


@fault("network_attention_of", "attention_in_a_network")
def attention_is_that_of_the_input_of_the_network(self, network, x, block=None, positions=None):
    """It is not that of what enters the block."""
    layers = {name: torch.eye(x.shape[-1], dtype=weight.dtype) for name, weight in network.layers.items()}
    bare = dataclasses.replace(network, layers=layers)
    return Textbook.network_attention_of(self, bare, x, block, positions)


@fault("network_attention_of", "attention_in_a_network")
def attention_is_looked_at_in_training(self, network, x, block=None, positions=None):
    """The statistics of the network follow the input that is looked at."""
    self.flow(network, x, training=True)
    return Textbook.network_attention_of(self, network, x, block, positions)


@fault("network_attention_of", "attention_in_a_network")
def positions_of_a_block_in_a_network_are_sorted(self, network, x, block=None, positions=None):
    """The rows do not come in the order that was asked for."""
    return Textbook.network_attention_of(self, network, x, block, None if positions is None else sorted(positions))


@fault("network_check_identity", "identity_in_a_network")
def only_the_first_block_must_be_the_identity(self, network):
    """Others may add what they want."""
    (name, block), *_ = self.places(network).items()
    check_identities({name: (self.exported(block), block.spec)})


@fault("network_check_identity", "identity_in_a_network")
def only_weights_must_be_zero(self, network):
    """A bias that is added to every position is not noticed."""
    blocks = self.places(network).items()
    check_identities({name: (self.exported(block) | {"norm.bias": np.zeros(1)}, block.spec) for name, block in blocks})


@fault("network_remove", "removal")
def only_one_block_is_taken_out(self, network):
    """Others stay."""
    network.blocks.popitem()


@fault("network_remove", "removal")
def a_block_that_is_taken_out_leaves_its_projection(self, network):
    """The layer before it has become another one."""
    for place, block in network.blocks.items():
        network.layers[place] = network.layers[place] + block.params["out.weight"].mean()
    Textbook.network_remove(self, network)


@fault("network_insert", "wrong_insertions")
def blocks_are_put_in_before_all_places_are_known(self, network, after, x, **options):
    """A refusal leaves some of them in the network."""
    if isinstance(after, list) and len(after) > 1:
        return [one for place in after for one in Textbook.network_insert(self, network, [place], x, **options)]
    return Textbook.network_insert(self, network, after, x, **options)


@fault("network_insert", "wrong_insertions")
def a_place_takes_several_blocks(self, network, after, x, **options):
    """A second one replaces the first."""
    network.blocks = {place: block for place, block in network.blocks.items() if place not in after}
    return Textbook.network_insert(self, network, after, x, **options)


@fault("network_attention_of", "wrong_insertions")
def an_unknown_block_stands_for_the_only_one(self, network, x, block=None, positions=None):
    """A slip of the pen is not noticed."""
    return Textbook.network_attention_of(self, network, x, None if len(network.blocks) == 1 else block, positions)


@fault("network_remove", "wrong_insertions")
def a_network_without_blocks_has_them_taken_out(self, network):
    """That there was none is not noticed."""
    network.blocks.clear()


@fault("network_load", "wrong_insertions")
def parameters_are_taken_in_until_one_does_not_fit(self, network, block, params):
    """A refusal leaves some of them in the block."""
    known = self.places(network)[block]
    for name, array in params.items():
        check_params(known.params | {name: array}, known.spec)
        known.params[name] = self.tensor(array).clone()
