"""Blocks of other implementations, as they are installed: their state dicts are read, and ours are loaded by them."""

import re

import numpy as np
import pytest
import torch

from nonlocal_core import nonlocal_block
from nonlocal_core.files.peers import find_peer_blocks, from_peer, to_peer
from peers import SUBJECTS, load

ADDRESSES = [address for address in SUBJECTS if not address.startswith("peers.fastreid")]
UNTOLD = ("scale", "subsample", "subsample_at", "group_size", "norm_epsilon")
OTHERS = re.compile(r"^(pytorchvideo|slowfast)-(gaussian|concatenation)_|^timm-(gaussian|dot_product|concatenation)_")
"""Cases of forms that an implementation lacks."""


def parameters():
    for address in ADDRESSES:
        driver = load(address)
        for case in driver.cases:
            if not case.training and not OTHERS.match(f"{driver.preset}-{case.name}"):
                yield pytest.param(driver, case, id=f"{driver.name}-{case.name}")


live = pytest.mark.parametrize(("driver", "case"), list(parameters()))


def filled(driver, case):
    """Return a live block whose parameters and statistics are those of the case."""
    module = driver.new(case.spec).double().eval()
    module.import_params(case.data().params)
    return module.module


def run(module, x):
    """Return what a live block makes of an input `(B, S1..Sk, C)`, in the same order."""
    with torch.no_grad():
        return torch.movedim(module(torch.movedim(torch.from_numpy(x), -1, 1).contiguous()), 1, -1).numpy()


@live
def test_the_state_dict_of_a_live_block_is_read_with_its_numbers(driver, case):
    module, data = filled(driver, case), case.data()
    file = {f"net.{key}": tensor for key, tensor in module.state_dict().items()}
    assert find_peer_blocks(file) == [("net", driver.preset)]
    options = {option: getattr(case.spec, option) for option in UNTOLD}
    params, spec = from_peer(file, peer=driver.preset, prefix="net", pairwise=case.spec.pairwise, **options)
    assert spec.replace(zero_init=case.spec.zero_init, norm_momentum=case.spec.norm_momentum) == case.spec
    expected = run(module, data.x)
    np.testing.assert_allclose(nonlocal_block(data.x, params, spec), expected, rtol=1e-12, atol=1e-12)
    assert np.abs(expected - data.x).max() > 0.01


@live
def test_a_live_block_loads_what_is_written_for_it(driver, case):
    data = case.data()
    file = to_peer(data.params, case.spec, peer=driver.preset, rank=driver.rank)
    module = driver.make(case.spec).double().eval()
    module.load_state_dict({key: torch.from_numpy(array) for key, array in file.items()}, strict=True)
    expected = nonlocal_block(data.x, data.params, case.spec)
    np.testing.assert_allclose(run(module, data.x), expected, rtol=1e-12, atol=1e-12)
