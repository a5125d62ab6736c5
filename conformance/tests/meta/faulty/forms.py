"""Faults in the formulas: projections, scores, the scale, and how scores become weights."""
# ruff: noqa: ARG001 - many a fault is that an argument is ignored

import dataclasses

import torch
from textbook import Textbook

from faulty import fault


@fault("project", "forward", "attention")
def theta_and_phi_are_exchanged(self, block, layer, a):
    """The queries get the weights of phi, the keys those of theta."""
    return Textbook.project(self, block, {"theta": "phi", "phi": "theta"}.get(layer, layer), a)


@fault("project", "forward", "attention")
def phi_shares_the_weights_of_theta(self, block, layer, a):
    """One projection serves for both."""
    return Textbook.project(self, block, "theta" if layer == "phi" else layer, a)


@fault("project", "forward")
def the_gaussian_form_has_no_g(self, block, layer, a):
    """Without an embedding the values are not projected either. Seen in a public PyTorch model zoo."""
    if layer == "g" and block.spec.pairwise == "gaussian":
        return self.operand(block, a[: block.spec.inner_channels])
    return Textbook.project(self, block, layer, a)


def _without_bias(layer):
    def bias(self, block, asked):
        return None if asked == layer else Textbook.bias(self, block, asked)

    bias.__name__, bias.__doc__ = f"the_bias_of_{layer}_is_dropped", f"The layer {layer} has no bias."
    return bias


fault("bias", "forward", "attention")(_without_bias("theta"))
fault("bias", "gradients")(_without_bias("phi"))
fault("bias", "forward")(_without_bias("g"))
fault("bias", "forward")(_without_bias("out"))
fault("bias", "forward", "attention")(_without_bias("concat"))


@fault("aggregate", "forward", "operation")
def channels_attend_to_channels(self, form, theta, phi, g, valid):
    """The affinity is C' x C', which every permutation of positions leaves. Seen in a public PyTorch package."""
    affinity = torch.softmax(self.wide(phi) @ self.wide(g).T, dim=0)
    return affinity.T @ self.wide(theta)


@fault("softmax", "forward", "attention")
def the_softmax_runs_over_the_queries(_, scores):
    """The columns of the weights sum to 1, not the rows."""
    return torch.softmax(scores, dim=0)


@fault("softmax", "forward", "attention")
def the_softmax_runs_over_all_pairs(_, scores):
    """All weights together sum to 1."""
    return torch.softmax(scores.flatten(), dim=0).reshape(scores.shape)


@fault("softmax", "forward", "attention")
def the_softmax_is_missing(_, scores):
    """Scores serve as weights. Seen in public implementations."""
    return scores


@fault("softmax", "forward", "attention")
def the_softmax_is_divided_by_the_number_of_keys(_, scores):
    """The rows of the weights sum to 1 / M."""
    return torch.softmax(scores, dim=1) / scores.shape[1]


@fault("softmax", "saturated_softmax")
def the_softmax_does_not_subtract_the_largest_score(_, scores):
    """The exponential of a large score is infinite."""
    powers = torch.exp(scores)
    return powers / powers.sum(dim=1, keepdim=True)


@fault("softmax", "saturated_softmax")
def the_softmax_subtracts_one_score_for_all_queries(_, scores):
    """A row whose scores are all far smaller becomes 0 / 0."""
    powers = torch.exp(scores - scores.max().detach())
    return powers / powers.sum(dim=1, keepdim=True)


@fault("divide", "forward", "attention")
def nothing_is_divided_by_the_number_of_keys(_, scores):
    """The sums grow with the size of the input."""
    return scores


@fault("divide", "forward", "operation")
def the_number_of_queries_divides(_, scores):
    """The count is that of theta, which differs from that of the pooled keys."""
    return scores / scores.shape[0]


@fault("divide", "forward")
def a_softmax_follows_the_division(_, scores):
    """The forms without a softmax get one, after 1 / M. Seen in a public package."""
    return torch.softmax(scores / scores.shape[1], dim=1)


@fault("gather", "forward")
def keys_are_counted_before_pooling(self, block, x, mask, sets):
    """M is the number of positions, not that of pooled keys."""
    y = Textbook.gather(self, block, x, mask, sets)
    return y if self.form(block).softmax else y * len(sets) * len(sets[0][1]) / x.shape[1]


@fault("gather", "forward")
def keys_are_counted_over_all_sets(self, block, x, mask, sets):
    """With axes or groups, M is the number of keys of the whole input."""
    y = Textbook.gather(self, block, x, mask, sets)
    return y if self.form(block).softmax else y / len(sets)


@fault("factor", "forward", "attention")
def the_scale_is_ignored(*_):
    """Scores are never scaled."""
    return 1.0


@fault("factor", "forward")
def the_scale_is_squared(self, spec):
    """It is applied to theta and to phi."""
    return Textbook.factor(self, spec) ** 2


@fault("factor", "forward")
def the_scale_is_inverted(self, spec):
    """Scores are divided by it. Seen in a public detection library."""
    return 1 / Textbook.factor(self, spec)


@fault("factor", "forward")
def the_sign_of_the_scale_is_dropped(self, spec):
    """A negative scale acts like a positive one."""
    return abs(Textbook.factor(self, spec))


@fault("factor", "forward")
def the_inner_scale_uses_the_channels_of_the_input(self, spec):
    """The scale "inner" is C^-1/2."""
    return spec.channels**-0.5 if spec.scale == "inner" else Textbook.factor(self, spec)


@fault("factor", "forward")
def the_input_scale_uses_the_inner_channels(self, spec):
    """The scale "input" is C'^-1/2."""
    return spec.inner_channels**-0.5 if spec.scale == "input" else Textbook.factor(self, spec)


@fault("factor", "forward")
def the_inner_scale_takes_half_of_the_channels(self, spec):
    """The scale "inner" does not know of another inner width."""
    return (spec.channels // 2) ** -0.5 if spec.scale == "inner" else Textbook.factor(self, spec)


@fault("factor", "forward", "attention")
def scores_are_scaled_unasked(self, spec):
    """The scale None is C'^-1/2. Seen in several public implementations."""
    return spec.inner_channels**-0.5 if spec.scale is None else Textbook.factor(self, spec)


@fault("factor", "forward")
def the_scale_is_ignored_without_a_softmax(self, spec):
    """The dot product and the concatenation are not scaled. Seen in public PyTorch libraries."""
    softmax = spec.normalize == "softmax" or spec.pairwise in {"gaussian", "embedded_gaussian"}
    return Textbook.factor(self, spec) if softmax else 1.0


@fault("weights", "forward", "operation")
def the_scale_multiplies_the_weights_of_a_softmax(self, form, theta, phi, valid):
    """It is applied after the softmax."""
    if not form.softmax:
        return Textbook.weights(self, form, theta, phi, valid)
    plain = dataclasses.replace(form, scale=1.0)
    return form.scale * Textbook.weights(self, plain, theta, phi, valid)


@fault("scores", "forward", "attention")
def the_scale_stands_inside_the_relu(self, form, theta, phi):
    """A negative scale of the concatenation turns the ReLU round."""
    if form.pairwise != "concatenation":
        return Textbook.scores(self, form, theta, phi)
    bias = None if form.bias is None else form.scale * form.bias
    inside = dataclasses.replace(form, scale=1.0, weight=form.scale * form.weight, bias=bias)
    return Textbook.scores(self, inside, theta, phi)


@fault("scores", "forward", "operation")
def the_halves_of_the_concatenation_are_exchanged(self, form, theta, phi):
    """The first half of w_f meets phi."""
    if form.pairwise != "concatenation":
        return Textbook.scores(self, form, theta, phi)
    exchanged = dataclasses.replace(form, weight=form.weight.roll(len(form.weight) // 2))
    return Textbook.scores(self, exchanged, theta, phi)


@fault("relu", "forward", "operation")
def the_relu_is_missing(_, a):
    """The concatenation keeps its negative scores."""
    return a


@fault("relu", "forward")
def the_relu_is_a_smooth_one(_, a):
    """The concatenation has a softplus."""
    return torch.nn.functional.softplus(a)


@fault("form", "forward")
def the_concatenation_has_a_softmax(self, block):
    """Its scores are normalised like those of the Gaussian forms."""
    form = Textbook.form(self, block)
    return dataclasses.replace(form, softmax=form.softmax or form.pairwise == "concatenation")


@fault("form", "forward")
def a_function_always_has_a_softmax(self, block):
    """The option `normalize` is ignored."""
    form = Textbook.form(self, block)
    return dataclasses.replace(form, softmax=form.softmax or callable(form.pairwise))


@fault("scores", "forward", "operation")
def a_function_gets_its_arguments_exchanged(self, form, theta, phi):
    """It is called with phi first and its result is transposed."""
    scores = Textbook.scores
    return scores(self, form, phi, theta).T if callable(form.pairwise) else scores(self, form, theta, phi)


@fault("scores", "forward")
def the_scores_of_a_function_are_not_scaled(self, form, theta, phi):
    """The scale acts on the named forms alone."""
    scores = Textbook.scores(self, form, theta, phi)
    return scores / form.scale if callable(form.pairwise) else scores


@fault("embed", "forward")
def the_gaussian_form_has_queries_of_unit_length(self, block, layer, a):
    """x_i . x_j is taken as a cosine."""
    result = Textbook.embed(self, block, layer, a)
    if block.spec.pairwise != "gaussian":
        return result
    return result / result.norm(dim=0, keepdim=True).clamp(min=1e-12)


@fault("residual", "forward")
def the_input_is_always_added(_, block, x, r):
    """The option `residual` is ignored."""
    return x + r.to(x.dtype)


@fault("residual", "forward", "identity_at_start")
def the_input_is_never_added(_, block, x, r):
    """The block returns its branch alone. Seen where the caller adds it."""
    return r.to(x.dtype)
