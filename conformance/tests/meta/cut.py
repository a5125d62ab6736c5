"""The textbook on an input that is cut over several devices: one process that computes the part of each in turn."""

import numpy as np
import torch

from nonlocal_conformance.memory import peak_resident
from nonlocal_core.errors import fail_value


class Cut:
    """The steps; `block.notes["cut"]` is the device of each position of each sample (B, N)."""

    def owners(self, shape, axis, devices):
        """Return the device of each position of each sample (B, N)."""
        size = shape[axis]
        device = np.arange(size) // -(-size // devices)
        place = [1] * (len(shape) - 1)
        place[axis] = size
        return np.broadcast_to(device.reshape(place), shape[:-1]).reshape(shape[0], -1)

    def is_whole(self, owners, positions):
        """Return whether each of these groups of positions (G, K) is on one device."""
        return (owners[:, positions] == owners[:, positions[:, :1]]).all()

    def cut(self, spec, shape, axis, devices):
        """Return the device of each position of each sample of an input (B, N)."""
        owners = self.owners(shape, axis, devices)
        for queries, windows in self.sets(spec, shape[1:-1]):
            groups = [queries[None]] if axis == 1 and spec.group_size is not None else []
            if not all(self.is_whole(owners, positions) for positions in (windows, *groups)):
                raise fail_value("x", "be cut between windows and groups", f"a cut along axis {axis}")
        return owners

    def share(self, block, device, parts):
        """Return what one device has of the keys (phi, g, valid) of all."""
        own = parts[device]
        others = sum(a.numel() for part in parts if part is not own for a in part[:2])
        block.notes["received"] = block.notes.get("received", 0) + others
        phi, g, valid = zip(*parts, strict=True)
        return torch.cat(phi, dim=1), torch.cat(g, dim=1), np.concatenate(valid)

    def of_devices(self, block, form, theta, x, mask, queries, windows):
        """Give the queries of each device, of one set, with their y (C', n)."""
        owner = block.notes["cut"][0]  # in one sample all positions are on one device, or in all samples on the same
        devices = np.unique(owner[queries])
        parts = [self.keys(block, x, mask, windows[owner[windows[:, 0]] == device]) for device in devices]
        for number, device in enumerate(devices):
            own = queries[owner[queries] == device]
            yield own, self.aggregate(form, theta[:, own], *self.share(block, number, parts))

    def moments_of_devices(self, block, r, counted, device):  # noqa: ARG002 - each has those of all
        """Return the mean and the biased variance with which one device normalises (B, C, N)."""
        owners = block.notes["cut"]
        parts = [self.pick(r, counted & (owners == one)) for one in np.unique(owners)]
        count = sum(part.shape[1] for part in parts)
        mean = sum(part.sum(dim=1) for part in parts) / count
        return mean, sum(((part - mean[:, None]) ** 2).sum(dim=1) for part in parts) / count

    def standardize_devices(self, block, r, counted):
        """Return what each device makes of its positions of r (B, C, N)."""
        result, owners = r, block.notes["cut"]
        for device in np.unique(owners):
            mean, variance = self.moments_of_devices(block, r, counted, device)
            normal = (r - mean[:, None]) / (variance + block.spec.norm_epsilon).sqrt()[:, None]
            result = torch.where(torch.from_numpy(owners == device)[:, None], normal, result)
        return result

    def sharded(self, spec, params, x, dz, key_mask=None, *, axis, devices, training=False, method="auto"):
        """Return z, the running statistics and the gradients of a cut input."""
        self.check(spec, params, x, key_mask, training, method)
        session = self.session(spec, params, method=method)
        session.block.notes["cut"] = self.cut(spec, x.shape, axis, devices)
        return session.gradients(x, dz, key_mask, training=training)

    def sharded_hvp(
        self, spec, params, x, dz, vx, vparams, key_mask=None, *, axis, devices, training=False, method="auto"
    ):
        """Return the second derivatives of a cut input."""
        self.check(spec, params, x, key_mask, training, method)
        block = self.build(spec, params)
        block.notes["cut"] = self.cut(spec, x.shape, axis, devices)
        return self.second(block, x, dz, vx, vparams, key_mask, training)

    def traffic(self, spec, params, x, key_mask=None, *, axis, devices):
        """Return how many numbers a device receives, forward and backward."""
        session = self.session(spec, params)
        session.block.notes["cut"] = self.cut(spec, x.shape, axis, devices)
        session.gradients(x, x, key_mask, training=True)
        received = session.block.notes.get("received", 0) / devices
        return received, received

    def sharded_memory(self, spec, params, x, dz, *, axis, devices):
        """Return the peak bytes of the one process that there is."""
        return peak_resident(lambda: self.sharded(spec, params, x, dz, axis=axis, devices=devices))[1]
