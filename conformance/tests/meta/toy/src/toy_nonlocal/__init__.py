"""A non-local block for images, the embedded Gaussian form and nothing else."""

import numpy as np

__all__ = ["Block"]
__version__ = "1.2.3"


class Block:
    """A block with channels last; `weights` and `biases` are those of theta, phi, g and out."""

    def __init__(self, weights, biases):
        self.weights, self.biases = weights, biases

    def __call__(self, image):
        """Return the image plus what each position gathers from all others."""
        batch, height, width, channels = image.shape
        flat = image.reshape(batch, height * width, channels)
        theta, phi, g = (self._layer(name, flat) for name in ("theta", "phi", "g"))
        scores = theta @ phi.swapaxes(1, 2)
        powers = np.exp(scores - scores.max(axis=2, keepdims=True))
        gathered = powers @ g / powers.sum(axis=2, keepdims=True)
        return image + self._layer("out", gathered).reshape(image.shape)

    def _layer(self, name, a):
        return a @ self.weights[name].T + self.biases[name]
