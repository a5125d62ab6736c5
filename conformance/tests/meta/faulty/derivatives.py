"""Faults in the gradients, where the output is right."""
# ruff: noqa: ARG001, ARG004 - many a fault is that an argument is ignored

import torch
from textbook import Textbook

from faulty import fault


@fault("pool", "gradients")
def at_a_tie_the_gradient_goes_to_the_last_position(self, values, inside):
    """Windows are searched from their end."""
    return Textbook.pool(self, values.flip(-1), inside[:, ::-1].copy())


@fault("pool", "gradients")
def at_a_tie_the_gradient_is_shared(_, values, inside):
    """Every largest position of a window gets an equal part."""
    valid = torch.from_numpy(inside)
    largest = values.masked_fill(~valid, -torch.inf).amax(dim=-1)
    return largest.masked_fill(~valid.any(dim=-1), 0)


@fault("relu", "gradients", raises=RuntimeError)
def the_relu_is_overwritten_in_place(_, a):
    """Its backward pass finds another value. Seen in a public PyTorch library, where only the output was tested."""
    return torch.relu(a).mul_(1.0)


@fault("relu", "gradients", "operation_gradients")
def negative_scores_have_a_gradient(_, a):
    """The ReLU passes every gradient."""
    return a + (torch.relu(a) - a).detach()


@fault("weights", "gradients", "operation_gradients")
def the_weights_are_detached(self, form, theta, phi, valid):
    """No gradient reaches theta and phi."""
    return Textbook.weights(self, form, theta, phi, valid).detach()


@fault("keys", "gradients")
def the_keys_are_detached_from_the_input(self, block, x, mask, windows):
    """The gradient of the input misses what comes through phi and g."""
    return Textbook.keys(self, block, x.detach(), mask, windows)


@fault("bias", "gradients")
def one_bias_has_the_gradient_zero(self, block, layer):
    """The bias of g is a constant."""
    bias = Textbook.bias(self, block, layer)
    return bias * 0 + bias.detach() if layer == "g" and bias is not None else bias


@fault("vjp", "gradients")
def one_parameter_has_no_gradient(self, *args, **options):
    """The gradient of one weight is missing."""
    dx, dparams = Textbook.vjp(self, *args, **options)
    return dx, {name: d for name, d in dparams.items() if name != "g.weight"}


@fault("vjp", "gradients")
def running_statistics_have_gradients(self, spec, params, *args, **options):
    """They appear among the parameters that are trained."""
    dx, dparams = Textbook.vjp(self, spec, params, *args, **options)
    return dx, {name: dparams.get(name, 0 * array) for name, array in params.items()}


@fault("vjp", "gradients")
def the_gradients_are_averaged_over_the_batch(self, *args, **options):
    """Those of the parameters are divided by B."""
    dx, dparams = Textbook.vjp(self, *args, **options)
    return dx, {name: d / len(dx) for name, d in dparams.items()}


@fault("op_vjp", "operation_gradients")
def the_operation_gives_no_gradient_of_its_weight(self, *args, **options):
    """That of w_f is missing."""
    return {name: d for name, d in Textbook.op_vjp(self, *args, **options).items() if name != "concat_weight"}


class _FirstOrderSoftmax(torch.autograd.Function):
    """A softmax whose backward pass is a constant to autograd."""

    @staticmethod
    def forward(ctx, scores):
        weights = torch.softmax(scores, dim=1)
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(ctx, gradient):
        (weights,) = ctx.saved_tensors
        weights = weights.detach()
        return weights * (gradient - (gradient * weights).sum(dim=1, keepdim=True))


@fault("softmax", "second_derivatives")
def a_backward_pass_of_its_own_is_not_differentiable(_, scores):
    """The second derivative of the softmax is silently 0."""
    return _FirstOrderSoftmax.apply(scores)


class _FirstOrder(torch.autograd.Function):
    """The identity, whose backward pass gives a constant to autograd."""

    @staticmethod
    def forward(ctx, a):
        return a.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.detach()


@fault("standardize", "second_derivatives")
def the_norm_is_of_first_order(self, block, r, counted):
    """What passes backwards through it is a constant to the second derivative."""
    return _FirstOrder.apply(Textbook.standardize(self, block, r, counted))


@fault("hvp", "second_derivatives")
def second_derivatives_are_zero(self, spec, params, x, dz, vx, vparams, *args, **options):
    """The first derivatives are constants."""
    return 0 * vx, {name: 0 * v for name, v in vparams.items()}


@fault("train", "trajectory")
def one_parameter_is_not_trained(self, spec, params, *args, **options):
    """The optimizer does not know of the weight of g. Seen where layers are made at the first call."""
    losses, trained = Textbook.train(self, spec, params, *args, **options)
    return losses, {**trained, "g.weight": params["g.weight"]}


@fault("train", "trajectory")
def weights_decay_in_training(self, *args, **options):
    """What should be plain descent draws the weight of `out` towards 0."""
    losses, trained = Textbook.train(self, *args, **options)
    return losses, {name: a * 0.999 if name == "out.weight" else a for name, a in trained.items()}


@fault("leaves", "trajectory")
def gradients_add_up_over_the_steps(self, block):
    """They are not cleared before the next step."""
    known = block.notes.get("leaves")
    if known is None:
        block.notes["leaves"] = Textbook.leaves(self, block)
        return block.notes["leaves"]
    for name, leaf in known.items():
        leaf.data = block.params[name].data
    block.params.update(known)
    return known
