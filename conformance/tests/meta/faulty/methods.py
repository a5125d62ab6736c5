"""Faults in the methods that do without the matrix of weights."""

import numpy as np
import torch
from textbook import Textbook

import nonlocal_core as nlc
from faulty import fault


@fault("block", "methods")
def one_method_ignores_the_scale(self, spec, *args, method="auto", **options):
    """The method "pairwise" computes another block than "auto"."""
    return Textbook.block(self, spec if method == "auto" else spec.replace(scale=None), *args, **options)


@fault("vjp", "gradients")
def one_method_has_other_gradients(self, spec, *args, method="auto", **options):
    """The method "pairwise" has the gradients of another block than "auto"."""
    return Textbook.vjp(self, spec if method == "auto" else spec.replace(scale=None), *args, **options)


@fault("aggregate", "many_blocks")
def the_rest_after_the_last_block_of_queries_loses_a_key(self, form, theta, phi, g, valid):
    """What 1,024 queries leave over sees all keys but the last valid one."""
    y = Textbook.aggregate(self, form, theta, phi, g, valid)
    if y.shape[1] <= 1024 or not valid.any():
        return y
    fewer = valid.copy()
    fewer[np.flatnonzero(valid)[-1]] = False
    return torch.cat([y[:, :1024], Textbook.aggregate(self, form, theta[:, 1024:], phi, g, fewer)], dim=1)


@fault("block", "many_blocks")
def the_choice_for_a_large_input_ignores_the_scale(self, spec, params, x, *args, method="auto", **options):
    """What "auto" takes beyond 1,000 positions is never asked for by its name."""
    is_large = method == "auto" and x[0, ..., 0].size > 1000
    return Textbook.block(self, spec.replace(scale=None) if is_large else spec, params, x, *args, **options)


@fault("vjp", "many_blocks")
def the_choice_for_a_large_input_has_other_gradients(self, spec, params, x, *args, method="auto", **options):
    """The output of what "auto" takes beyond 1,000 positions is right."""
    is_large = method == "auto" and x[0, ..., 0].size > 1000
    return Textbook.vjp(self, spec.replace(scale=None) if is_large else spec, params, x, *args, **options)


@fault("hvp", "second_derivatives")
def one_method_has_no_second_derivatives(self, spec, params, x, dz, vx, vparams, *args, method="auto", **options):
    """Those of the fused kernel are silently zero."""
    hx, hparams = Textbook.hvp(self, spec, params, x, dz, vx, vparams, *args, **options)
    keep = 1 if method in {"auto", "pairwise"} else 0
    return keep * hx, {name: keep * h for name, h in hparams.items()}


@fault("compiled", "compiled")
def one_method_loses_the_mask_when_compiled(self, spec, params, x, key_mask=None, *, method="auto", **options):
    """Its graph has one argument."""
    return Textbook.compiled(self, spec, params, x, key_mask if method == "pairwise" else None, **options)


@fault("operation", "adversarial_data")
def prefix_sums_are_not_centred(self, tensors, options):
    """Large opposite offsets of a and b cancel in the prefix sums and leave few digits."""
    if options.get("method") != "sorted" or options.get("key_mask") is not None:
        return Textbook.operation(self, tensors, options)
    theta, phi, g = (tensors[name] for name in ("theta", "phi", "g"))
    of_theta, of_phi = tensors["concat_weight"].chunk(2)
    a, b = theta @ of_theta + tensors["concat_bias"], phi @ of_phi
    falling, order = b.sort(dim=1, descending=True)
    values = g.take_along_dim(order[..., None], 1)
    prefix = torch.cat([values, falling[..., None] * values], dim=2).cumsum(dim=1)
    prefix = torch.cat([torch.zeros_like(prefix[:, :1]), prefix], dim=1)
    rank = torch.searchsorted(-falling.detach(), a.detach())
    plain, weighted = prefix.take_along_dim(rank[..., None], 1).chunk(2, dim=2)
    return options["scale"] / phi.shape[1] * (a[..., None] * plain + weighted)


@fault("relu", "adversarial_data")
def a_key_with_score_zero_gets_a_gradient(_, a):
    """What is sorted by >= counts it among the active ones."""
    return torch.where(a >= 0, a, 0)


@fault("softmax", "adversarial_data")
def the_largest_score_is_that_of_the_first_block(_, scores):
    """The running softmax never moves its shift."""
    powers = torch.exp(scores - scores[:, :64].max(dim=1, keepdim=True).values.detach())
    return powers / powers.sum(dim=1, keepdim=True)


@fault("op", "many_positions")
def the_keys_of_one_block_alone_are_read(_, theta, phi, g, **options):
    """The loop over chunks of keys ends after the first."""
    return nlc.nonlocal_op(theta, phi[:, :1024], g[:, :1024], **options)


@fault("aggregate", "memory")
def the_matrix_of_weights_is_held_in_evaluation(self, form, theta, phi, g, valid):
    """All queries are computed at once."""
    return self.combine(self.weights(form, theta, phi, valid), g.masked_fill(~torch.from_numpy(valid), 0))


@fault("aggregate", "memory")
def the_matrix_of_weights_is_kept_for_the_gradients(self, form, theta, phi, g, valid):
    """A chunk of queries is computed at a time, and its weights are kept."""
    g = g.masked_fill(~torch.from_numpy(valid), 0)
    blocks = theta.split(256, dim=1)
    return torch.cat([self.combine(self.weights(form, rows, phi, valid), g) for rows in blocks], dim=1)
