"""Faults that show only where two options meet, or at one value of an option."""

import dataclasses

import torch
from textbook import Textbook

from faulty import fault


@fault("mask", "forward")
def the_mask_of_a_sequence_is_ignored(self, key_mask, x):
    """With one spatial axis every position is a key."""
    return Textbook.mask(self, None if x.dim() == 3 else key_mask, x)


@fault("form", "forward", "attention")
def within_sets_a_softmax_is_a_division(self, block):
    """Where positions interact in sets, the scores are divided by the number of keys."""
    form, spec = Textbook.form(self, block), block.spec
    return dataclasses.replace(form, softmax=form.softmax and spec.axes == "all" and spec.group_size is None)


@fault("window", "forward", "attention")
def within_space_keys_are_not_pooled(self, spec, rank):
    """With axes="space" every position is a key."""
    return Textbook.window(self, spec.replace(subsample=None) if spec.axes == "space" else spec, rank)


@fault("window", "forward", "attention")
def within_groups_frames_are_not_pooled(self, spec, rank):
    """With groups the window has one frame."""
    first, *others = Textbook.window(self, spec, rank)
    return (first if spec.group_size is None else 1, *others)


@fault("factor", "forward", "attention")
def the_scale_is_lost_with_pooling(self, spec):
    """Where keys are pooled, the scores are not scaled."""
    return Textbook.factor(self, spec) if spec.subsample is None else 1.0


@fault("bias", "forward")
def the_bias_of_concat_is_lost_with_pooling(self, block, layer):
    """Where keys are pooled, concat has no bias."""
    return None if layer == "concat" and block.spec.subsample else Textbook.bias(self, block, layer)


@fault("bias", "forward")
def the_bias_of_concat_is_lost_within_sets(self, block, layer):
    """Where positions interact in sets, concat has no bias."""
    in_sets = block.spec.axes != "all" or block.spec.group_size is not None
    return None if layer == "concat" and in_sets else Textbook.bias(self, block, layer)


@fault("interacting", "forward", "attention")
def the_second_axis_alone_is_taken_for_the_first(self, spec, rank):
    """axes=(1,) means axes=(0,)."""
    return (0,) if spec.axes == (1,) else Textbook.interacting(self, spec, rank)


@fault("interacting", "forward", "attention")
def of_the_first_two_axes_the_second_is_left_out(self, spec, rank):
    """axes=(0, 1) means axes=(0,)."""
    return (0,) if spec.axes == (0, 1) else Textbook.interacting(self, spec, rank)


@fault("interacting", "forward", "attention")
def in_a_video_the_first_two_axes_are_all(self, spec, rank):
    """axes=(0, 1) means every axis, where the third has a window of 1."""
    is_hidden = spec.axes == (0, 1) and rank == 3 and spec.subsample in {None, (2, 1, 1)}
    return (0, 1, 2) if is_hidden else Textbook.interacting(self, spec, rank)


@fault("flatten", "forward")
def two_axes_of_one_length_are_exchanged(self, x):
    """A square is read column by column."""
    is_square = x.dim() > 3 and x.shape[-1] == x.shape[-2]
    return Textbook.flatten(self, x.mT if is_square else x)


@fault("grids", "forward", "attention")
def groups_of_one_frame_are_one_group(self, spec, spatial):
    """With group_size=1 all frames interact."""
    return Textbook.grids(self, spec.replace(group_size=None) if spec.group_size == 1 else spec, spatial)


@fault("residual", "forward")
def one_channel_is_not_added(self, block, x, r):
    """An input of one channel has no residual connection."""
    one = dataclasses.replace(block, spec=block.spec.replace(residual=False)) if x.shape[1] == 1 else block
    return Textbook.residual(self, one, x, r)


@fault("scores", "forward")
def one_inner_channel_has_no_sign(self, form, theta, phi):
    """With C' = 1 the scores are positive."""
    scores = Textbook.scores(self, form, theta, phi)
    return scores.abs() if len(theta) == 1 else scores


@fault("project", "forward", "attention")
def as_many_inner_channels_share_a_projection(self, block, layer, a):
    """With C' = C theta is the projection of phi."""
    is_square = block.spec.channels == block.spec.inner_channels
    return Textbook.project(self, block, "phi" if layer == "theta" and is_square else layer, a)


@fault("operation", "operation")
def values_wider_than_keys_are_cut(self, tensors, options):
    """The channels of g beyond those of theta are 0."""
    g, width = tensors["g"], tensors["theta"].shape[2]
    kept = torch.arange(g.shape[2]) < width
    return Textbook.operation(self, {**tensors, "g": g * kept.to(g.dtype)}, options)


@fault("call", "forward")
def a_video_has_no_norm(self, block, x, key_mask=None, training=False):
    """With three spatial axes the branch is not normalised."""
    spec = block.spec.replace(norm=None) if x.dim() == 5 else block.spec
    return Textbook.call(self, dataclasses.replace(block, spec=spec), x, key_mask, training)


@fault("norm", "forward")
def without_a_residual_there_is_no_norm(self, block, r, counted):
    """With residual=False the branch is not normalised."""
    return Textbook.norm(self, block, r, counted) if block.spec.residual else self.wide(r)


@fault("norm", "forward", "gradients")
def the_frozen_norm_standardizes_in_training(self, block, r, counted):
    """In training an affine norm is normalised by the statistics of the input."""
    if block.spec.norm != "affine" or counted is None:
        return Textbook.norm(self, block, r, counted)
    r = self.wide(r)
    mean, variance = self.moments(self.pick(r, counted))
    r = (r - mean[:, None]) / (variance + block.spec.norm_epsilon).sqrt()[:, None]
    return r * block.params["norm.weight"][:, None] + block.params["norm.bias"][:, None]


@fault("counted", "forward")
def one_sample_is_normalised_by_the_running_statistics(self, mask, training):
    """In training a batch of one is taken for evaluation."""
    return Textbook.counted(self, mask, training and len(mask) > 1)


@fault("update", "statistics")
def a_momentum_of_zero_is_that_of_the_framework(self, block, r):
    """The running statistics move where they should stay."""
    spec = block.spec.replace(norm_momentum=block.spec.norm_momentum or 0.1)
    return Textbook.update(self, dataclasses.replace(block, spec=spec), r)


@fault("standardize", "forward")
def a_layer_without_bias_has_the_mean_zero(self, block, r, counted):
    """Where out has no bias, the norm subtracts no mean."""
    if block.spec.bias["out"]:
        return Textbook.standardize(self, block, r, counted)
    _, variance = self.serving(block, r, counted)
    return r / (variance + block.spec.norm_epsilon).sqrt()[:, None]


@fault("windows", "forward", "attention")
def a_window_as_long_as_its_axis_is_none(self, grid, lengths):
    """Along an axis that one window fills, keys are not pooled."""
    pairs = zip(grid.shape, lengths, strict=True)
    return Textbook.windows(self, grid, tuple(1 if size == length else length for size, length in pairs))


@fault("keys", "gradients")
def after_a_projection_the_last_of_equal_keys_has_the_gradient(self, block, x, mask, windows):
    """At a tie behind the projection the gradient goes to the last position."""
    is_behind = block.spec.subsample_at == "projection"
    return Textbook.keys(self, block, x, mask, windows[:, ::-1].copy() if is_behind else windows)


@fault("rebuilt", "rebuilt")
def the_start_is_no_part_of_the_config(_, spec):
    """A block made anew starts as the identity, whatever zero_init was."""
    return spec.replace(zero_init=True)


@fault("combine", "many_blocks")
def wide_values_are_multiplied_in_fewer_bits(self, weights, g):
    """With more than eight channels, float32 values have ten bits, as in TF32."""
    if len(g) > 8 and g.dtype == torch.float32:
        g = (g.detach().view(torch.int32) & -8192).view(torch.float32) + (g - g.detach())
    return Textbook.combine(self, weights, g)


@fault("aggregate", "memory")
def the_matrix_of_weights_is_held_beside_a_mask(self, form, theta, phi, g, valid):
    """Where a key is masked, all queries are computed at once."""
    if valid.all():
        return Textbook.aggregate(self, form, theta, phi, g, valid)
    g = g.masked_fill(~torch.from_numpy(valid), 0)
    return self.combine(self.weights(form, theta, phi, valid), g)
