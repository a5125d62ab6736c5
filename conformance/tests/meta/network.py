"""A network of the textbook: matrices by name, blocks by the matrix after which they stand, and the steps of both."""

import dataclasses

import torch

from nonlocal_core import AttentionMap, NonLocalSpec, param_shapes
from nonlocal_core.errors import fail_value
from nonlocal_core.networks.insertion import (
    CHILD,
    Insertion,
    check_identities,
    fail_taken,
    resolve_block,
    resolve_places,
)
from nonlocal_core.planning import check_method
from nonlocal_core.spec.parameters import check_params


@dataclasses.dataclass
class Network:
    """What the suite calls; each call is a step of the driver."""

    driver: object
    layers: dict
    blocks: dict = dataclasses.field(default_factory=dict)

    def __getattr__(self, step):
        return lambda *args, **options: getattr(self.driver, f"network_{step}")(self, *args, **options)


class Networks:
    """The steps."""

    def network(self, layers, shape):  # noqa: ARG002 - the layers take any
        """Return a network of linear layers."""
        return Network(self, {name: self.tensor(weight).clone() for name, weight in layers.items()})

    def places(self, network):
        """Return the blocks by their names."""
        return {f"{place}.{CHILD}": block for place, block in network.blocks.items()}

    def flow(self, network, x, training=False):
        """Return what enters each block, by its place, and what leaves the network."""
        entering, flow = {}, self.input(x)
        for name, weight in network.layers.items():
            flow = torch.tensordot(weight, flow.movedim(1, 0), 1).movedim(0, 1)
            if name in network.blocks:
                entering[name] = flow
                flow = self.call(network.blocks[name], flow, None, training)
        return entering, flow

    def network_run(self, network, x, *, training=False):
        """Return the output."""
        return self.output(self.flow(network, x, training)[1])

    def network_state(self, network):
        """Return all parameters and statistics."""
        state = dict(network.layers)
        state |= {f"{name}.{key}": a for name, block in self.places(network).items() for key, a in block.params.items()}
        return {name: tensor.numpy().copy() for name, tensor in state.items()}

    def new_block(self, spec, dtype):
        """Return a block as it starts."""
        params = {name: self.start(spec, name, shape).to(dtype) for name, shape in param_shapes(spec).items()}
        return self.build(spec, {name: a.numpy() for name, a in params.items()}, dtype)

    def network_insert(self, network, after, x, *, method="auto", **options):
        """Put blocks in, after all that is asked for has been checked."""
        insertions = []
        for place in resolve_places(after, network.layers):
            if place in network.blocks:
                raise fail_taken(place)
            shape = (*x.shape[:-1], len(network.layers[place]))
            spec = NonLocalSpec(channels=shape[-1], **options)
            check_method(method, spec.pairwise)
            spec.check_input(shape)
            insertions.append(Insertion(place, f"{place}.{CHILD}", shape, spec))
        for one in insertions:
            network.blocks[one.after] = self.new_block(one.spec, network.layers[one.after].dtype)
        return insertions

    def network_remove(self, network):
        """Take all blocks out."""
        if not network.blocks:
            raise fail_value("model", "have at least one inserted non-local block", "none")
        network.blocks.clear()

    def network_load(self, network, block, params):
        """Let a block take parameters in."""
        known = self.places(network)[block]
        check_params(params, known.spec)
        known.params.update(self.build(known.spec, params).params)

    def network_check_identity(self, network):
        """Check that every block is the identity."""
        check_identities({name: (self.exported(block), block.spec) for name, block in self.places(network).items()})

    def network_attention_of(self, network, x, block=None, positions=None):
        """Return rows of the weights of a block for what enters it."""
        name = resolve_block(block, self.places(network))
        entering = self.output(self.flow(network, x)[0][name.removesuffix(f".{CHILD}")])
        found = self.places(network)[name]
        rows = self.attention(found.spec, self.exported(found), entering, positions)
        return AttentionMap(rows, positions, entering.shape[1:-1], found.spec)
