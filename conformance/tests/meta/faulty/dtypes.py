"""Faults where dtypes and layouts meet, and of what is compiled with its gradients."""
# ruff: noqa: ARG001 - many a fault is that an argument is ignored

import numpy as np
import torch
from textbook import Textbook

from faulty import fault

# An input whose dtype is not that of the parameters


@fault("residual", "input_of_another_dtype")
def the_output_has_the_dtype_of_the_parameters(self, block, x, r):
    """A narrow input gives a wide output."""
    return Textbook.residual(self, block, x, r).to(block.params["g.weight"].dtype)


@fault("on", "input_of_another_dtype")
def the_parameters_take_over_the_dtype_of_the_input(self, block, x):
    """A call rounds them, and they stay so."""
    if block.compute is None:
        block.params.update({name: a.to(x.dtype) for name, a in block.params.items()})
    return Textbook.on(self, block, x)


@fault("vjp", "input_of_another_dtype")
def gradients_have_the_dtype_of_the_input(self, spec, params, x, dz, key_mask=None, *, training=False, method="auto"):
    """That of a parameter is narrower or wider than the parameter."""
    dx, dparams = Textbook.vjp(self, spec, params, x, dz, key_mask, training=training, method=method)
    return dx, {name: d.astype(x.dtype) for name, d in dparams.items()}


@fault("on", "input_of_another_dtype")
def an_input_is_computed_in_the_narrowest_dtype_there_is(self, block, x):
    """Where its dtype is not that of the parameters, both are taken for bfloat16."""
    known = Textbook.on(self, block, x)
    is_other = block.compute is None and x.dtype != block.params["g.weight"].dtype
    return Textbook.on(self, block, x.bfloat16()) if is_other else known


@fault("attention", "input_of_another_dtype")
def the_rows_of_the_weights_have_the_dtype_of_the_parameters(self, spec, params, x, positions=None, key_mask=None):
    """They are wider than the input."""
    return Textbook.attention(self, spec, params, x, positions, key_mask).astype(params["g.weight"].dtype)


# Mixed precision


@fault("operand", "mixed_gradients")
def what_is_rounded_has_no_gradient(self, block, a):
    """Under mixed precision the parameters are not trained."""
    operand = Textbook.operand(self, block, a)
    return operand if operand.dtype == a.dtype else operand.detach()


@fault("mixed_vjp", "mixed_gradients")
def mixed_precision_knows_evaluation_alone(
    self, spec, params, x, dz, dtype, key_mask=None, *, training=False, method="auto"
):
    """In training it takes the running statistics, and leaves them."""
    return Textbook.mixed_vjp(self, spec, params, x, dz, dtype, key_mask, method=method)


@fault("mixed_vjp", "mixed_gradients")
def gradients_of_parameters_are_left_in_half_precision(
    self, spec, params, x, dz, dtype, key_mask=None, *, training=False, method="auto"
):
    """What an optimizer adds to float32 parameters is float16."""
    options = {"training": training, "method": method}
    *others, dparams = Textbook.mixed_vjp(self, spec, params, x, dz, dtype, key_mask, **options)
    return *others, {name: d.astype(np.float16) for name, d in dparams.items()}


@fault("combine", "mixed_gradients")
def sums_over_keys_are_differentiated_in_half_precision(self, weights, g):
    """Their gradient keeps the four leading bits of the weights."""
    if g.dtype in {torch.float64, torch.float32}:
        return Textbook.combine(self, weights, g)
    rounded = weights + (weights.to(torch.float8_e4m3fn).to(weights.dtype) - weights).detach()
    exact, rough = Textbook.combine(self, weights, g.detach()), Textbook.combine(self, rounded.detach(), g)
    return exact + rough - rough.detach()


@fault("mixed_attention", "mixed_attention")
def the_rows_of_the_weights_ignore_the_mask_in_half_precision(self, spec, params, x, dtype, key_mask=None):
    """They show keys that take no part."""
    return Textbook.mixed_attention(self, spec, params, x, dtype)


@fault("mixed_attention", "mixed_attention")
def the_rows_of_the_weights_are_left_in_half_precision(self, spec, params, x, dtype, key_mask=None):
    """Their dtype is not that of the input."""
    return Textbook.mixed_attention(self, spec, params, x, dtype, key_mask).astype(np.float16)


@fault("mixed_attention", "mixed_attention")
def the_rows_of_the_weights_know_bfloat16_alone(self, spec, params, x, dtype, key_mask=None):
    """In float16 they have fewer digits than were asked for."""
    return Textbook.mixed_attention(self, spec, params, x, "bfloat16", key_mask)


# Layouts


class _Relaid(torch.autograd.Function):
    """The identity, whose gradient is read as if channels came last."""

    @staticmethod
    def forward(ctx, a):  # noqa: ARG004 - the name is given
        return a.view_as(a)

    @staticmethod
    def backward(ctx, d):  # noqa: ARG004 - the name is given
        return d.mT.reshape(d.shape)


@fault("call", "layouts")
def the_gradient_of_a_contiguous_input_is_laid_out_as_channels_last(self, block, x, key_mask=None, training=False):
    """Its numbers stand at other positions."""
    is_usual = x.is_contiguous() and x.requires_grad
    return Textbook.call(self, block, _Relaid.apply(x) if is_usual else x, key_mask, training)


@fault("mask", "layouts")
def a_mask_is_read_in_the_order_of_its_memory(self, key_mask, x):
    """A transposed one is another."""
    return Textbook.mask(self, None if key_mask is None else key_mask.ravel(order="K"), x)


# Compiled with gradients


@fault("compiled_vjp", "compiled_training")
def the_statistics_of_a_compiled_block_stay(self, spec, params, x, dz, key_mask=None, *, training=False, method="auto"):
    """What is moved inside the graph is a copy."""
    options = {"training": training, "method": method}
    z, statistics, *gradients = Textbook.compiled_vjp(self, spec, params, x, dz, key_mask, **options)
    return z, {name: params[name] for name in statistics}, *gradients


@fault("compiled_vjp", "compiled_training")
def a_compiled_block_takes_its_parameters_for_constants(
    self, spec, params, x, dz, key_mask=None, *, training=False, method="auto"
):
    """They have no gradient."""
    options = {"training": training, "method": method}
    *others, dparams = Textbook.compiled_vjp(self, spec, params, x, dz, key_mask, **options)
    return *others, {name: 0 * d for name, d in dparams.items()}


@fault("compiled_vjp", "compiled_training")
def a_compiled_block_was_traced_without_its_mask(
    self, spec, params, x, dz, key_mask=None, *, training=False, method="auto"
):
    """It heeds every key."""
    return Textbook.compiled_vjp(self, spec, params, x, dz, None, training=training, method=method)


@fault("compiled_vjp", "compiled_training")
def the_gradient_of_a_compiled_block_is_that_of_the_branch(
    self, spec, params, x, dz, key_mask=None, *, training=False, method="auto"
):
    """The residual is lost on the way back."""
    options = {"training": training, "method": method}
    z, statistics, dx, dparams = Textbook.compiled_vjp(self, spec, params, x, dz, key_mask, **options)
    return z, statistics, dx - dz, dparams
