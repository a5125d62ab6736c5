"""Faults in the normalisation: its numbers, its statistics and its modes."""
# ruff: noqa: ARG001 - many a fault is that an argument is ignored

import dataclasses

import numpy as np
import torch
from textbook import Textbook

from faulty import fault
from nonlocal_core.spec.parameters import STATISTICS


def _with_spec(block, **options):
    return dataclasses.replace(block, spec=block.spec.replace(**options))


def _everywhere(r):
    return np.ones((r.shape[0], r.shape[2]), bool)


@fault("norm", "forward")
def gamma_is_ignored(self, block, r, counted):
    """The norm has no scale."""
    r = Textbook.norm(self, block, r, counted)
    if block.spec.norm is None:
        return r
    beta = block.params["norm.bias"][:, None]
    return (r - beta) / block.params["norm.weight"][:, None] + beta


@fault("norm", "forward")
def beta_is_ignored(self, block, r, counted):
    """The norm has no shift."""
    r = Textbook.norm(self, block, r, counted)
    return r if block.spec.norm is None else r - block.params["norm.bias"][:, None]


@fault("norm", "forward")
def gamma_stands_before_the_bias_of_out(self, block, r, counted):
    """The frozen norm is folded into the weight of `out`, and not into its bias."""
    bias = self.bias(block, "out")
    if block.spec.norm != "affine" or bias is None:
        return Textbook.norm(self, block, r, counted)
    return Textbook.norm(self, block, r - bias[:, None], counted) + bias[:, None]


@fault("norm", "forward")
def the_frozen_norm_standardizes(self, block, r, counted):
    """The norm "affine" uses the statistics of the input."""
    if block.spec.norm == "affine":
        mean, variance = self.moments(r.movedim(1, 0).flatten(1))
        r = (r - mean[:, None]) / (variance + block.spec.norm_epsilon).sqrt()[:, None]
    return Textbook.norm(self, block, r, counted)


@fault("standardize", "forward", "gradients")
def running_statistics_normalise_in_training(self, block, r, counted):
    """Training is computed as evaluation. Seen where a norm was frozen by mistake."""
    return Textbook.standardize(self, block, r, None)


@fault("standardize", "forward")
def batch_statistics_normalise_in_evaluation(self, block, r, counted):
    """Evaluation is computed as training. Seen in a public TensorFlow model."""
    return Textbook.standardize(self, block, r, _everywhere(r))


@fault("standardize", "forward")
def each_sample_has_its_own_statistics(_, block, r, counted):
    """The batch axis is left out of the moments."""
    variance, mean = torch.var_mean(r, dim=2, correction=0, keepdim=True)
    return (r - mean) / (variance + block.spec.norm_epsilon).sqrt()


@fault("standardize", "forward")
def each_position_has_its_own_statistics(_, block, r, counted):
    """The moments are taken over the channels."""
    variance, mean = torch.var_mean(r, dim=1, correction=0, keepdim=True)
    return (r - mean) / (variance + block.spec.norm_epsilon).sqrt()


@fault("standardize", "forward")
def the_unbiased_variance_normalises(self, block, r, counted):
    """In training the divisor is B N - 1."""
    if counted is None:
        return Textbook.standardize(self, block, r, counted)
    variance, mean = torch.var_mean(self.pick(r, counted), dim=1, correction=1)
    return (r - mean[:, None]) / (variance + block.spec.norm_epsilon).sqrt()[:, None]


@fault("standardize", "forward")
def the_variance_is_taken_as_the_deviation(self, block, r, counted):
    """The square root is missing."""
    mean, variance = self.serving(block, r, counted)
    return (r - mean[:, None]) / (variance + block.spec.norm_epsilon)[:, None]


@fault("standardize", "forward")
def epsilon_is_added_to_the_deviation(self, block, r, counted):
    """It stands outside of the square root."""
    mean, variance = self.serving(block, r, counted)
    return (r - mean[:, None]) / (variance.sqrt() + block.spec.norm_epsilon)[:, None]


@fault("standardize", "forward")
def epsilon_is_that_of_another_framework(self, block, r, counted):
    """An `norm_epsilon` of 1e-5 is 1e-3."""
    epsilon = 1e-3 if block.spec.norm_epsilon == 1e-5 else block.spec.norm_epsilon
    return Textbook.standardize(self, _with_spec(block, norm_epsilon=epsilon), r, counted)


@fault("standardize", "forward")
def epsilon_is_not_passed_on(self, block, r, counted):
    """It is 1e-5 whatever `norm_epsilon` says. Seen in a public video library."""
    return Textbook.standardize(self, _with_spec(block, norm_epsilon=1e-5), r, counted)


@fault("standardize", "gradients")
def batch_statistics_are_constants_of_the_gradient(self, block, r, counted):
    """No gradient flows through the mean and the variance."""
    mean, variance = (a.detach() for a in self.serving(block, r, counted))
    return (r - mean[:, None]) / (variance + block.spec.norm_epsilon).sqrt()[:, None]


@fault("moments", "statistics_far_from_zero")
def the_variance_is_a_difference_of_moments(_, r):
    """E[r^2] - E[r]^2 cancels where the mean is large. Seen as the default of a public framework."""
    mean = r.mean(dim=1)
    return mean, ((r**2).mean(dim=1) - mean**2).clamp(min=0)


@fault("serving", "forward", "gradients", "masked_positions", "masked_gradients")
def masked_positions_are_normalised_with_their_own_statistics(self, block, r, counted):
    """Padding counts in the mean and the variance. Seen in every framework's layer that gets no mask."""
    return Textbook.serving(self, block, r, counted if counted is None else _everywhere(r))


@fault("pick", "forward", "statistics")
def the_statistics_are_those_of_the_samples_without_a_mask(_, r, counted):
    """A sample with a masked position does not count at all, unless all have one."""
    whole = counted.all(axis=1)
    return r[whole if whole.any() else slice(None)].movedim(1, 0).flatten(1)


@fault("counted", "forward", "statistics")
def a_batch_without_a_valid_position_counts_whole(_, mask, training):
    """Where every position is masked, the mask has no effect on the statistics."""
    return (mask if mask.any() else ~mask) if training else None


@fault("update", "statistics", "statistics_over_steps")
def the_running_variance_is_of_the_other_kind(self, block, r):
    """It is biased where the driver says that it is not."""
    mean, variance = self.moments(r)
    share, new = block.spec.norm_momentum, {"norm.mean": mean, "norm.variance": variance}
    return {name: (1 - share) * block.params[name] + share * value for name, value in new.items()}


@fault("update", "statistics", "statistics_over_steps")
def the_momentum_is_the_share_of_the_old_statistics(self, block, r):
    """It is read as another framework reads it. Seen in a public model zoo."""
    return Textbook.update(self, _with_spec(block, norm_momentum=1 - block.spec.norm_momentum), r)


@fault("update", "statistics")
def the_momentum_is_not_passed_on(self, block, r):
    """It is 0.1 whatever `norm_momentum` says. Seen in a public video library."""
    return Textbook.update(self, _with_spec(block, norm_momentum=0.1), r)


@fault("update", "statistics", "statistics_over_steps")
def running_statistics_do_not_move(*_):
    """Training leaves them as they were."""
    return {}


@fault("update", "statistics")
def the_running_mean_moves_alone(self, block, r):
    """The variance stays as it was."""
    return {"norm.mean": Textbook.update(self, block, r)["norm.mean"]}


@fault("standardize", "statistics")
def running_statistics_move_in_evaluation(self, block, r, counted):
    """Every call is a step."""
    result = Textbook.standardize(self, block, r, counted)
    if counted is None:
        block.params.update(self.update(block, r.movedim(1, 0).flatten(1)))
    return result


@fault("statistics", "statistics")
def the_running_variance_is_given_as_its_inverse_root(self, block):
    """What is exported as the variance is what multiplies."""
    found = Textbook.statistics(self, block)
    return {name: a**-0.5 if name == "norm.variance" else a for name, a in found.items()}


@fault("statistics", "statistics_over_steps")
def statistics_are_live_arrays(_, block):
    """What was given out changes with the next step."""
    return {name: block.params[name].numpy() for name in STATISTICS if name in block.params}
