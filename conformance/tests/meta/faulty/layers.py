"""Faults of a block in which a layer stands in the place of another: what reads its weights does not call it."""
# ruff: noqa: ARG001 - many a fault is that an argument is ignored

import dataclasses

from textbook import Textbook

from faulty import fault


def _plain(block):
    """Return the block with the layers that it has made."""
    return dataclasses.replace(block, notes={})


@fault("put", "replaced_layers")
def a_layer_is_not_called_but_its_weights_are_read(_, block, layer, result):
    """What was put in its place changes nothing. Seen in this project's own first version, in every framework."""
    return result


@fault("put", "replaced_layers")
def a_layer_is_called_without_a_gradient(self, block, layer, result):
    """The output is that of the layer, and its gradient that of the layer before."""
    return result + (Textbook.put(self, block, layer, result) - result).detach()


@fault("project", "replaced_layers")
def a_weight_is_a_constant_once_its_layer_is_replaced(self, block, layer, a):
    """It is not trained any more. Seen where a normalisation makes the weight anew in each call."""
    name = f"{layer}.weight"
    fixed = block.params | {name: block.params[name].detach()}
    is_replaced = layer == block.notes.get("replaced")
    return Textbook.project(self, dataclasses.replace(block, params=fixed) if is_replaced else block, layer, a)


@fault("rows", "replaced_layers")
def the_rows_of_the_weights_are_those_of_the_layers_before(self, block, x, positions, key_mask):
    """The attention reads weights where the output calls layers."""
    return Textbook.rows(self, _plain(block), x, positions, key_mask)


@fault("embed", "replaced_layers")
def the_weight_of_the_concatenation_is_folded_into_the_weights_of_other_layers(self, block, layer, a):
    """In this form theta and phi are not called."""
    return Textbook.embed(self, _plain(block) if block.spec.pairwise == "concatenation" else block, layer, a)


@fault("keys", "replaced_layers")
def layers_behind_the_pooling_are_not_called(self, block, x, mask, windows):
    """Where the input is pooled, phi and g read weights."""
    pooled = block.spec.subsample_at == "input" and block.spec.subsample is not None
    return Textbook.keys(self, _plain(block) if pooled else block, x, mask, windows)


@fault("exported", "replaced_layers")
def the_parameters_of_a_replaced_layer_are_exported_as_they_are_kept(_, block):
    """What is exported is not what the block computes with."""
    return {name: a.detach().numpy() for name, a in block.params.items()}


@fault("exported", "replaced_layers")
def the_export_does_not_say_which_layer_it_cannot_read(_, block):
    """The error names no layer."""
    message = "a layer has no weight"
    raise ValueError(message)


@fault("exported", "replaced_layers", raises=KeyError)
def the_export_runs_into_a_weight_that_is_not_there(_, block):
    """The error is that of a dict. Seen in this project's own first version under every parametrisation."""
    return {}[f"{block.notes['replaced']}.weight"]
