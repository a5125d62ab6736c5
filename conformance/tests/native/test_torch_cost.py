"""The counted FLOPs are those that PyTorch's own counter sees."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import nonlocal_core as nlc
from nonlocal_torch import NonLocalBlock

FORMS = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")


def seen(spec, shape, training):
    """Return the FLOPs that the counter sees on a block, forward or in a training step."""
    # In float32 the block spares those of theta and phi of which the concatenation form needs one number each.
    dtype = torch.bfloat16 if spec.pairwise == "concatenation" else torch.float32
    block = NonLocalBlock.from_spec(spec, method="pairwise", dtype=dtype).train(training)
    batch, *spatial, channels = shape
    x = torch.randn(batch, channels, *spatial, requires_grad=training, dtype=dtype)
    with FlopCounterMode(display=False) as counter:
        z = block(x)
        if training:
            z.sum().backward()
    # The counter hooks every module, so the weight of the concatenation is asked for by a call beside the operation.
    asked = counter.get_flop_counts().get("NonLocalBlock.concat", {})
    return counter.get_total_flops() - sum(asked.values())


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("pairwise", FORMS)
@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (3, 7, 12)),
        ({"subsample": 2, "norm": "batch"}, (3, 7, 6, 12)),
        ({"subsample": 2, "subsample_at": "input", "norm": "affine", "bias": False}, (3, 7, 6, 12)),
        ({"axes": "space", "subsample": 2, "residual": False}, (2, 4, 5, 6, 12)),
        ({"group_size": 2, "subsample": (1, 2, 3), "subsample_at": "input"}, (2, 4, 5, 6, 12)),
    ],
    ids=["sequence", "pooled", "pooled input", "space", "groups"],
)
def test_the_flops_are_those_that_pytorch_counts(options, shape, pairwise, training):
    spec = nlc.NonLocalSpec(channels=12, inner_channels=5, pairwise=pairwise, **options)
    assert nlc.cost(spec, shape, training=training).methods["pairwise"].flops == seen(spec, shape, training)
