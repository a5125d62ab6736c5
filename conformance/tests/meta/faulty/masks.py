"""Faults in the mask: what it reaches, and what is left where it leaves nothing."""
# ruff: noqa: ARG001 - many a fault is that an argument is ignored

import numpy as np
import torch
from textbook import Textbook

from faulty import fault


@fault("mask", "forward", "attention", "masked_positions")
def the_mask_is_ignored(self, key_mask, x):
    """Every position is a key."""
    return Textbook.mask(self, None, x)


@fault("mask", "forward")
def the_mask_is_inverted(self, key_mask, x):
    """True hides a position."""
    return Textbook.mask(self, key_mask if key_mask is None else ~key_mask, x)


@fault("mask", "forward")
def the_mask_of_the_first_sample_serves_all(self, key_mask, x):
    """The batch axis of the mask is lost."""
    mask = Textbook.mask(self, key_mask, x)
    return np.repeat(mask[:1], len(mask), axis=0)


@fault("mask", "forward", "permutation")
def the_mask_is_read_column_by_column(self, key_mask, x):
    """Its spatial axes are flattened in reverse."""
    mask = Textbook.mask(self, key_mask, x).reshape(x.shape[0], *x.shape[2:])
    return np.stack([sample.ravel(order="F") for sample in mask])


@fault("call", "forward")
def masked_positions_are_no_queries_either(self, block, x, key_mask=None, training=False):
    """The output at a masked position is the input."""
    z = Textbook.call(self, block, x, key_mask, training)
    return z if key_mask is None else torch.where(torch.from_numpy(key_mask)[:, None], z, x)


@fault("weights", "forward", "attention", "operation")
def masked_keys_keep_their_weights(self, form, theta, phi, valid):
    """Masked keys are 0, but take part in the softmax and in the count."""
    return Textbook.weights(self, form, theta, phi, np.ones_like(valid))


@fault("weights", "forward", "attention", "operation")
def masked_keys_are_counted(self, form, theta, phi, valid):
    """M is the number of all keys, masked ones too."""
    weights = Textbook.weights(self, form, theta, phi, valid)
    return weights if form.softmax else weights * (valid.sum() / len(valid))


@fault("weights", "forward", "attention")
def the_mask_follows_the_softmax(self, form, theta, phi, valid):
    """Weights are set to 0 after they were normalised over all keys."""
    weights = Textbook.weights(self, form, theta, phi, np.ones_like(valid))
    count = len(valid) / max(valid.sum(), 1)
    return weights.masked_fill(~torch.from_numpy(valid), 0) * (1 if form.softmax else count)


@fault("weights", "forward", "attention")
def the_mask_is_a_finite_number_that_leaks(self, form, theta, phi, valid):
    """Masked scores get -10 added."""
    if not form.softmax:
        return Textbook.weights(self, form, theta, phi, valid)
    return self.softmax(self.scores(form, theta, phi) - 10 * torch.from_numpy(~valid))


@fault("weights", "attention")
def a_query_without_keys_attends_evenly(self, form, theta, phi, valid):
    """Where every key is masked, each has the same weight. Seen in a public fused attention."""
    return Textbook.weights(self, form, theta, phi, valid if valid.any() else ~valid)


@fault("aggregate", "forward", "operation")
def a_query_without_keys_gets_the_average(self, form, theta, phi, g, valid):
    """Where every key is masked, the mask has no effect. Seen in a public fused attention."""
    return Textbook.aggregate(self, form, theta, phi, g, valid if valid.any() else ~valid)


@fault("aggregate", "forward", "operation")
def a_query_without_keys_is_not_a_number(self, form, theta, phi, g, valid):
    """Where every key is masked, the softmax is 0 / 0."""
    return Textbook.aggregate(self, form, theta, phi, g, valid) * (1.0 if valid.any() else torch.nan)


@fault("admit", "masked_positions", "masked_gradients", "masked_attention")
def padding_goes_in_as_it_is(self, flat, mask):
    """What is no number at a masked position is hidden as a key, and its weights times 0 are none in a gradient."""
    return flat, torch.zeros(len(flat), 1, flat.shape[2], dtype=torch.bool)


@fault("admit", "masked_gradients")
def padding_goes_in_as_it_is_and_comes_out_as_nan(self, flat, mask):
    """The output is right; the gradients have 0 times what is no number."""
    return flat, Textbook.admit(self, flat, mask)[1]


@fault("admit", "masked_positions", "masked_attention")
def only_nan_counts_as_no_number(self, flat, mask):
    """Infinities go in."""
    lost = ~torch.from_numpy(mask)[:, None] & flat.isnan().any(dim=1, keepdim=True)
    return flat.masked_fill(lost, 0), lost


@fault("admit", "masked_positions")
def positions_that_are_no_numbers_are_hidden_without_a_mask(self, flat, mask):
    """A NaN at a key that takes part is taken for 0, and nobody sees it."""
    lost = ~flat.isfinite().all(dim=1, keepdim=True)
    return flat.masked_fill(lost, 0), lost & ~torch.from_numpy(mask)[:, None]


@fault("admit", "masked_positions", "masked_gradients")
def each_channel_of_the_padding_is_on_its_own(self, flat, mask):
    """Only the channels that are no number go in as 0 and come out as NaN."""
    lost = ~torch.from_numpy(mask)[:, None] & ~flat.isfinite()
    return flat.masked_fill(lost, 0), lost


@fault("release", "masked_positions", "masked_attention")
def padding_that_is_no_number_comes_out_as_if_it_were_zero(self, z, lost):
    """Nobody sees that it was none."""
    return z


@fault("aggregate", "masked_keys")
def masked_keys_are_multiplied_by_their_zero_weights(self, form, theta, phi, g, valid):
    """g at a masked key is not set to 0, and an infinite one makes every sum NaN."""
    return self.combine(self.weights(form, theta, phi, valid), g)


@fault("weights", "masked_keys")
def masked_scores_are_hidden_after_the_exponential(self, form, theta, phi, valid):
    """The output is right, and the gradient is 0 * inf where a masked score is large."""
    if not form.softmax or not valid.any():
        return Textbook.weights(self, form, theta, phi, valid)
    scores, shown = self.scores(form, theta, phi), torch.from_numpy(valid)
    largest = scores.masked_fill(~shown, -torch.inf).max(dim=1, keepdim=True).values.detach()
    powers = torch.exp(scores - largest).masked_fill(~shown, 0)
    return powers / powers.sum(dim=1, keepdim=True)


@fault("keys", "forward", "masked_positions")
def the_mask_is_ignored_in_pooling(self, block, x, mask, windows):
    """The largest value of a window may be that of a masked position."""
    phi, g, _ = Textbook.keys(self, block, x, np.ones_like(mask), windows)
    return phi, g, mask[windows].any(axis=1)


@fault("pool", "forward")
def masked_positions_are_pooled_as_zeros(self, values, inside):
    """A window with a masked position is never negative."""
    return Textbook.pool(self, values * torch.from_numpy(inside), np.ones_like(inside))


@fault("valid_keys", "forward", "attention")
def a_pooled_key_needs_every_position_of_its_window(_, inside):
    """One masked position hides the whole window."""
    return inside.all(axis=1)


@fault("valid_keys", "forward", "attention")
def a_pooled_key_needs_the_first_position_of_its_window(_, inside):
    """The mask is subsampled, not pooled."""
    return inside[:, 0]


@fault("valid_keys", "forward", "attention")
def the_mask_is_lost_with_pooling(_, inside):
    """Every pooled key is valid."""
    return np.ones_like(inside[:, 0])
