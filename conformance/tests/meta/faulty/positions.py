"""Faults in which positions belong together: flattening, axes, groups and windows."""
# ruff: noqa: ARG001 - many a fault is that an argument is ignored

import dataclasses
import itertools
import math

import numpy as np
import torch
from textbook import Textbook

from faulty import fault


@fault("flatten", "forward", "permutation")
def positions_are_read_column_by_column_and_written_row_by_row(_, x):
    """The first spatial axis is flattened last."""
    return x.movedim(2, -1).flatten(2)


@fault("flatten", "forward")
def the_memory_is_read_as_if_it_were_contiguous(_, x):
    """The strides of the input are ignored."""
    strides = torch.empty(x.shape, device="meta").stride()
    return torch.as_strided(x, x.shape, strides).flatten(2)


@fault("flatten", "layouts", raises=RuntimeError)
def only_an_input_that_can_be_viewed_flat_is_accepted(_, x):
    """A transposed input fails. Seen in a public PyTorch implementation."""
    return x.view(*x.shape[:2], -1)


@fault("layout", "layouts")
def the_memory_layout_is_lost(_, z, x):
    """A channels-last input gives a channels-first output. Seen in a public PyTorch implementation."""
    return z.contiguous()


@fault("gather", "forward", "permutation")
def the_result_is_reshaped_where_it_must_be_transposed(self, block, x, mask, sets):
    """y (N, C') is reshaped to (C', N). Seen in public TensorFlow implementations."""
    y = Textbook.gather(self, block, x, mask, sets)
    return y.T.reshape(y.shape)


@fault("scores", "forward", "permutation")
def phi_is_reshaped_where_it_must_be_transposed(self, form, theta, phi):
    """phi (M, C') is reshaped to (C', M). Seen in several public TensorFlow implementations."""
    return Textbook.scores(self, form, theta, phi.T.reshape(phi.shape))


@fault("combine", "forward", "permutation")
def g_is_reshaped_where_it_must_be_transposed(self, weights, g):
    """g (M, C') is reshaped to (C', M)."""
    return Textbook.combine(self, weights, g.T.reshape(g.shape))


@fault("interacting", "forward", "attention")
def space_and_time_are_exchanged(_, spec, rank):
    """Axes "space" are the frames, axes "time" the pixels."""
    return {"all": tuple(range(rank)), "space": (0,), "time": (1, 2)}.get(spec.axes, spec.axes)


@fault("interacting", "forward", "attention")
def positions_interact_along_every_axis(_, spec, rank):
    """The option `axes` is ignored."""
    return tuple(range(rank))


@fault("interacting", "forward")
def axes_are_counted_from_the_last(self, spec, rank):
    """Axis 0 is the width."""
    axes = Textbook.interacting(self, spec, rank)
    return axes if isinstance(spec.axes, str) else tuple(rank - 1 - axis for axis in reversed(axes))


@fault("grids", "forward", "attention")
def groups_are_ignored(self, spec, spatial):
    """Frames of all groups interact."""
    return Textbook.grids(self, spec.replace(group_size=None), spatial)


@fault("grids", "forward", "sizes")
def the_group_size_is_taken_as_the_number_of_groups(self, spec, spatial):
    """There are `group_size` groups, as one public implementation counts them."""
    size = spec.group_size and spatial[0] // spec.group_size
    return Textbook.grids(self, spec.replace(group_size=size), spatial)


@fault("sets", "forward")
def windows_cross_the_border_of_two_groups(self, spec, spatial):
    """The video is pooled before it is cut into groups."""
    sets = Textbook.sets(self, spec, spatial)
    if spec.group_size is None:
        return sets
    windows = self.windows(np.arange(math.prod(spatial)).reshape(spatial), self.window(spec, len(spatial)))
    return [(queries, windows[np.isin(windows[:, 0], queries)]) for queries, _ in sets]


@fault("sets", "forward")
def axes_that_act_as_batch_are_pooled_too(self, spec, spatial):
    """The window of an int reaches along every axis."""
    sets = Textbook.sets(self, spec, spatial)
    if spec.axes == "all" or not isinstance(spec.subsample, int):
        return sets
    length, numbers = spec.subsample, np.arange(math.prod(spatial)).reshape(spatial)
    axes = self.interacting(spec, len(spatial))
    outer = [axis for axis in range(len(spatial)) if axis not in axes]
    found = []
    for queries, windows in sets:
        corners = [np.unravel_index(window, spatial) for window in windows]
        wide = []
        for corner in corners:
            box = [
                range(c.min() // length * length, min(c.min() // length * length + length, spatial[axis]))
                if axis in outer
                else sorted(set(c.tolist()))
                for axis, c in enumerate(corner)
            ]
            cells = numbers[np.ix_(*box)].ravel()
            wide.append(np.resize(cells, length ** len(spatial)))
        found.append((queries, np.stack(wide)))
    return found


@fault("window", "forward", raises=(AssertionError, ValueError))
def the_window_is_given_in_reverse(self, spec, rank):
    """The entries of a tuple `subsample` are read from the last axis to the first."""
    return Textbook.window(self, spec, rank)[::-1]


@fault("window", "forward")
def keys_are_never_pooled(self, spec, rank):
    """The option `subsample` is ignored."""
    return (1,) * len(self.interacting(spec, rank))


@fault("windows", "forward")
def windows_overlap(_, grid, lengths):
    """The stride of the pooling is 1. Seen in a public Keras implementation."""
    starts = [range(size - length + 1) for size, length in zip(grid.shape, lengths, strict=True)]
    boxes = [tuple(map(slice, corner, np.add(corner, lengths))) for corner in itertools.product(*starts)]
    return np.stack([grid[box].ravel() for box in boxes])


@fault("windows", "forward")
def the_remainder_becomes_a_key(_, grid, lengths):
    """The number of windows is rounded up."""
    axes = [
        [np.minimum(range(start, start + length), size - 1) for start in range(0, size, length)]
        for size, length in zip(grid.shape, lengths, strict=True)
    ]
    return np.stack([grid[np.ix_(*box)].ravel() for box in itertools.product(*axes)])


@fault("windows", "forward", "permutation_in_windows")
def the_remainder_is_dropped_at_the_front(self, grid, lengths):
    """Windows end with the last position, so that the first ones are in none."""
    rests = [size % length for size, length in zip(grid.shape, lengths, strict=True)]
    return Textbook.windows(self, grid[tuple(slice(rest, None) for rest in rests)], lengths)


@fault("windows", "forward", "permutation_in_windows")
def the_flattened_axis_is_pooled(_, grid, lengths):
    """The window is one-dimensional and wraps round the ends of rows. Seen in a public Keras implementation."""
    length = max(lengths)
    flat = grid.ravel()[: grid.size // length * length]
    return flat.reshape(-1, length)


@fault("pool", "forward")
def pooling_takes_the_average(_, values, inside):
    """The mean of the valid positions of a window is its key."""
    valid = torch.from_numpy(inside).to(values.dtype)
    return (values * valid).sum(dim=-1) / valid.sum(dim=-1).clamp(min=1)


@fault("keys", "forward")
def what_projections_get_is_pooled_always(self, block, x, mask, windows):
    """Pooling stands before phi and g, whatever `subsample_at` says. Seen where weights were ported."""
    pooled = dataclasses.replace(block, spec=block.spec.replace(subsample_at="input"))
    return Textbook.keys(self, pooled, x, mask, windows)


@fault("keys", "forward")
def what_projections_give_is_pooled_always(self, block, x, mask, windows):
    """Pooling stands after phi and g, whatever `subsample_at` says. Seen where weights were ported."""
    pooled = dataclasses.replace(block, spec=block.spec.replace(subsample_at="projection"))
    return Textbook.keys(self, pooled, x, mask, windows)
