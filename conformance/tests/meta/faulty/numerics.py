"""Faults in numbers: dtypes, half precision, memory, and what a call keeps from the last one."""
# ruff: noqa: ARG001 - many a fault is that an argument is ignored

import dataclasses

import numpy as np
import torch
from textbook import Textbook

from faulty import fault


@fault("wide", "forward", "gradients", "operation")
def float64_is_computed_in_float32(_, a):
    """The products of a wide input are narrow."""
    return a.float()


@fault("unflatten", "forward")
def the_output_is_always_float32(_, flat, x):
    """A float64 input gives a float32 output."""
    return flat.reshape(x.shape).float()


@fault("output", "forward")
def the_output_is_always_float64(self, z):
    """A float32 input gives a float64 output."""
    return Textbook.output(self, z).astype(np.float64)


@fault("operation", "operation")
def the_operation_returns_its_sums_as_they_are(self, tensors, options):
    """The dtype of y is not that of theta."""
    return Textbook.operation(self, tensors, options).double()


@fault("wide", "large_scores")
def products_stay_in_half_precision(_, a):
    """Scores, weights and sums have the dtype of the operands. Seen in public PyTorch libraries."""
    return a


@fault("scores", "score_digits")
def scores_are_rounded_to_half_precision(self, form, theta, phi):
    """They leave their product in float32 and are stored in the dtype of the operands."""
    return self.wide(Textbook.scores(self, form, theta, phi).to(theta.dtype))


@fault("scores", "large_scores")
def the_scale_follows_a_product_in_half_precision(self, form, theta, phi):
    """The unscaled score exceeds the largest float16. Seen in a public PyTorch library."""
    plain = dataclasses.replace(form, scale=1.0)
    return form.scale * self.wide(Textbook.scores(self, plain, theta, phi).to(theta.dtype))


@fault("combine", "long_sums")
def sums_over_the_keys_are_in_half_precision(self, weights, g):
    """Each addition is rounded."""
    if g.dtype in {torch.float64, torch.float32}:
        return Textbook.combine(self, weights, g)
    total = torch.zeros(len(g), len(weights), dtype=g.dtype)
    for key in range(g.shape[1]):
        total += g[:, key, None] * weights[:, key].to(g.dtype)
    return total


@fault("residual", "mixed_identity")
def the_input_is_added_in_half_precision(self, block, x, r):
    """z is rounded to the dtype of the operands."""
    z = Textbook.residual(self, block, x, r)
    return z.to(block.compute).to(x.dtype)


@fault("mixed", "mixed_precision", "mixed_identity")
def the_output_is_in_half_precision(self, *args, **options):
    """z has the dtype of the operands, not that of x."""
    return Textbook.mixed(self, *args, **options).astype(np.float16)


@fault("mixed", "mixed_precision")
def bfloat16_is_computed_for_float16(self, spec, params, x, dtype, key_mask=None, *, method="auto"):
    """The operands have fewer digits than were asked for."""
    return Textbook.mixed(self, spec, params, x, "bfloat16", key_mask, method=method)


@fault("rounded", "mixed_precision", "mixed_gradients", "mixed_attention")
def products_in_tf32_have_operands_of_eight_bits(self, a, bits):
    """They are those of bfloat16, and TF32 has eleven."""
    return Textbook.rounded(self, a, 8)


@fault("mixed", "mixed_precision")
def the_method_auto_alone_heeds_the_dtype(self, spec, params, x, dtype, key_mask=None, *, method="auto"):
    """The operands of the other methods have fewer digits than were asked for."""
    dtype = dtype if method == "auto" else "bfloat16"
    return Textbook.mixed(self, spec, params, x, dtype, key_mask, method=method)


@fault("residual", "arguments_unchanged")
def the_input_is_overwritten(_, block, x, r):
    """The residual is added in place."""
    return x.add_(r) if block.spec.residual else r.to(x.dtype)


@fault("call", "arguments_unchanged")
def masked_positions_of_the_input_are_overwritten(self, block, x, key_mask=None, training=False):
    """The tensor of the caller is masked in place."""
    x = x if key_mask is None else x.masked_fill_(~torch.from_numpy(key_mask)[:, None], 0)
    return Textbook.call(self, block, x, key_mask, training)


@fault("call", "determinism")
def a_call_adds_noise_within_the_tolerance(self, block, x, key_mask=None, training=False):
    """Two calls differ in their last digits."""
    z = Textbook.call(self, block, x, key_mask, training)
    return z * (1 + 4 * torch.finfo(z.dtype).eps * torch.rand_like(z))


@fault("call", "forward", "determinism", "sizes")
def weights_are_made_anew_on_every_call(self, block, x, key_mask=None, training=False):
    """Layers are created inside the call. Seen in a public Keras implementation."""
    made = {name: a + torch.rand_like(a) for name, a in block.params.items()}
    return Textbook.call(self, dataclasses.replace(block, params=made), x, key_mask, training)


@fault("gather", "sizes")
def the_number_of_keys_is_kept_from_the_first_call(self, block, x, mask, sets):
    """M does not follow the size of the input."""
    keys = sum(len(windows) for _, windows in sets)
    first = block.notes.setdefault("keys", keys)
    y = Textbook.gather(self, block, x, mask, sets)
    return y if self.form(block).softmax else y * keys / first


@fault("call", "sizes", raises=RuntimeError)
def the_batch_of_the_first_call_is_kept(self, block, x, key_mask=None, training=False):
    """Another batch size fails. Seen in a public video library, and in test mode too."""
    batch = block.notes.setdefault("batch", len(x))
    return Textbook.call(self, block, x.expand(batch, *x.shape[1:]), key_mask, training)


@fault("call", "sizes")
def the_output_is_kept_for_the_next_input_of_the_same_shape(self, block, x, key_mask=None, training=False):
    """A cache knows the shape alone."""
    if x.shape not in block.notes:
        block.notes[x.shape] = Textbook.call(self, block, x, key_mask, training)
    return block.notes[x.shape]


@fault("call", "statistics_over_steps")
def running_statistics_start_anew_on_every_call(self, block, x, key_mask=None, training=False):
    """Each step moves them from where they began."""
    for name in ("norm.mean", "norm.variance"):
        if name in block.params:
            block.params[name].copy_(block.notes.setdefault(name, block.params[name].clone()))
    return Textbook.call(self, block, x, key_mask, training)
