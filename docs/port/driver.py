"""The driver: it speaks for the block of `textbook`, in NumPy arrays with channels last."""

import torch
from textbook import Block

from nonlocal_conformance import Unsupported


class Driver:
    """What the suite needs to know about the block."""

    name = "textbook"
    version = "1.0"
    dtypes = ("float64", "float32")
    methods = ("auto",)
    capabilities = frozenset({"vjp"})  # gradients, beside the output
    unbiased = False
    implementation = Block

    def __init__(self, device="cpu"):
        self.device = torch.device(device)

    def block(self, spec, params, x, key_mask=None, *, training=False, method="auto"):
        """Return the output, and no statistics: the block has no norm."""
        block, image = self.prepared(spec, params, x, key_mask)
        return self.array(block(image)), {}

    def vjp(self, spec, params, x, dz, key_mask=None, *, training=False, method="auto"):
        """Return the gradients of the input and of the parameters."""
        block, image = self.prepared(spec, params, x, key_mask)
        image.requires_grad_()
        block(image).backward(self.tensor(dz))
        gradients = {name: a.grad.flatten(1) if a.ndim == 4 else a.grad for name, a in block.named_parameters()}
        return self.array(image.grad), {name: a.numpy(force=True) for name, a in gradients.items()}

    def prepared(self, spec, params, x, key_mask):
        """Return a block with these parameters, and the input; refuse what the block has no option for."""
        known = {name: getattr(spec, name) for name in ("channels", "inner_channels", "scale")}
        if spec != type(spec)(**known) or key_mask is not None or x.ndim != 4:
            raise Unsupported("it has the embedded Gaussian form on images, with a scale and no other option")
        image = self.tensor(x)
        block = self.implementation(spec.channels, spec.inner_channels, spec.scale_factor).to(image)
        kernels = {name: a[..., None, None] if a.ndim == 2 else a for name, a in params.items()}
        block.load_state_dict({name: torch.from_numpy(a) for name, a in kernels.items()})
        return block, image

    def tensor(self, a):
        """Return `(B, H, W, C)` as a tensor with channels first."""
        return torch.from_numpy(a).to(self.device).movedim(-1, 1)

    def array(self, tensor):
        """Return a tensor with channels first as `(B, H, W, C)`."""
        return tensor.movedim(1, -1).numpy(force=True)


class Reshaped(Block):
    """The block with a fault that public ones have had: positions are laid out by a reshape, without a transpose."""

    def by_query(self, a):
        """Return an array of the right shape, whose rows mix channels and positions."""
        return a.reshape(a.shape[0], -1, a.shape[1])


class FaultyDriver(Driver):
    """The same driver, for the faulty block."""

    name = "reshaped"
    implementation = Reshaped
