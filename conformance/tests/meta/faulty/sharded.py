"""Faults of an implementation on several devices, each of which has some of the positions."""

import numpy as np
import torch
from textbook import Textbook

from faulty import fault


@fault("share", "sharded")
def each_device_attends_to_its_own_keys(_, block, device, parts):  # noqa: ARG001 - it looks at no other
    """Keys of other devices are left out."""
    return parts[device]


@fault("share", "sharded")
def a_gather_forgets_which_keys_are_masked(self, block, device, parts):
    """Every key that comes from another device counts as valid."""
    phi, g, valid = Textbook.share(self, block, device, parts)
    return phi, g, np.ones_like(valid)


@fault("share", "sharded")
def sums_are_divided_by_the_keys_of_one_device(self, block, device, parts):
    """The weights are too large by the number of devices where they are divided by a count."""
    phi, g, valid = Textbook.share(self, block, device, parts)
    is_counted = block.spec.pairwise in {"dot_product", "concatenation"}
    return phi, g * (len(valid) / max(len(parts[device][2]), 1) if is_counted else 1), valid


@fault("share", "sharded", "sharded_second_derivatives")
def a_gradient_stays_on_its_device(self, block, device, parts):
    """What a device adds to the gradients of the keys of others is lost."""
    kept = [part if n == device else (part[0].detach(), part[1].detach(), part[2]) for n, part in enumerate(parts)]
    return Textbook.share(self, block, device, kept)


@fault("share", "traffic")
def keys_are_sent_twice(self, block, device, parts):
    """A device asks for the keys of others once for phi and once for g."""
    Textbook.share(self, block, device, parts)
    return Textbook.share(self, block, device, parts)


@fault("moments_of_devices", "sharded")
def statistics_are_those_of_one_device(self, block, r, counted, device):
    """Each device normalises by the mean and the variance of its own positions."""
    own = counted & (block.notes["cut"] == device)
    return self.moments(self.pick(r, own if own.any() else counted))


@fault("moments_of_devices", "sharded")
def statistics_are_means_of_those_of_the_devices(self, block, r, counted, device):  # noqa: ARG001 - of all alike
    """Means and variances of the devices are averaged, as if their positions were as many and had one mean."""
    owners = block.notes["cut"]
    parts = [counted & (owners == one) for one in np.unique(owners)]
    found = [self.moments(self.pick(r, part)) for part in parts if part.any()]
    return tuple(torch.stack(one).mean(dim=0) for one in zip(*found, strict=True))


@fault("update", "sharded")
def the_running_variance_counts_the_positions_of_one_device(self, block, r):
    """The variance is made unbiased by the number of positions of one device."""
    moved = Textbook.update(self, block, r)
    if "cut" not in block.notes:
        return moved
    count, devices, share = r.shape[1], len(np.unique(block.notes["cut"])), block.spec.norm_momentum
    own = max(count // devices, 2)
    kept = (1 - share) * block.params["norm.variance"]
    factor = own / (own - 1) * (count - 1) / count
    return moved | {"norm.variance": kept + (moved["norm.variance"] - kept) * factor}


@fault("is_whole", "wrong_cuts")
def a_window_across_a_border_is_not_seen(_, owners, positions):  # noqa: ARG001 - it does not look
    """A cut through a window or a group is taken."""
    return True


@fault("sharded_memory", "sharded_memory")
def a_device_holds_what_all_hold(_, spec, params, x, dz, *, axis, devices):  # noqa: ARG001 - however many
    """Each device projects the whole input."""
    return 8 * x.nbytes
