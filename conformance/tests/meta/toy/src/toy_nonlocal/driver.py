"""What the conformance suite needs to know about the block."""

import toy_nonlocal
from nonlocal_conformance import Unsupported

LAYERS = ("theta", "phi", "g", "out")


class ToyDriver:
    """The block, with the names and the axes of the suite."""

    name = "toy"
    version = toy_nonlocal.__version__
    dtypes = ("float64", "float32")
    methods = ("auto",)
    capabilities = frozenset()

    def __init__(self, device="cpu"):
        if device != "cpu":
            message = f"`device` must be 'cpu' for the backend 'toy'. Got {device!r}."
            raise ValueError(message)
        self.device = device

    def block(self, spec, params, x, key_mask=None, *, training=False, method="auto"):  # noqa: ARG002 - has none
        """Return the output, and no statistics."""
        plain = type(spec)(channels=spec.channels, inner_channels=spec.inner_channels)
        if spec != plain or key_mask is not None or x.ndim != 4:
            message = "the toy has the embedded Gaussian form on images, and no options"
            raise Unsupported(message)
        weights, biases = ({name: params[f"{name}.{kind}"] for name in LAYERS} for kind in ("weight", "bias"))
        return toy_nonlocal.Block(weights, biases)(x), {}
