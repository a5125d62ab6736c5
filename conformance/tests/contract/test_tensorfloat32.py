"""The adapters' drivers compute in TF32 where that is asked for, and nowhere else, on any device."""

from collections import defaultdict
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tensorflow as tf
import torch

import nonlocal_core as nlc
from nonlocal_conformance import loader
from nonlocal_conformance.plugin import pytest_report_header
from nonlocal_core.arguments import dtype_name

IS_ON = {
    "tensorflow": tf.config.experimental.tensor_float_32_execution_enabled,
    "torch": lambda: torch.get_float32_matmul_precision() == "high",
    "jax": lambda: jax.config.jax_default_matmul_precision == "tensorfloat32",
}


@pytest.mark.parametrize("name", IS_ON)
def test_a_driver_multiplies_in_tf32_where_that_is_asked_for_alone(name):
    tf.config.experimental.enable_tensor_float_32_execution(enabled=True)  # as it is unless a driver says otherwise
    driver, seen = loader.load(name), []

    def product(theta, phi):
        seen.append((IS_ON[name](), dtype_name(theta)))
        return theta[:, :, :1] * phi[:, None, :, 0]

    spec = nlc.NonLocalSpec(channels=4, pairwise=product, normalize="softmax")
    params = {n: a.astype("float32") for n, a in nlc.init_params(spec, np.random.default_rng(0)).items()}
    x = np.ones((2, 5, 4), "float32")
    calls = {
        "block": lambda: driver.block(spec, params, x),
        "mixed": lambda: driver.mixed(spec, params, x, "tensorfloat32"),
        "mixed_vjp": lambda: driver.mixed_vjp(spec, params, x, x, "tensorfloat32"),
        "mixed_attention": lambda: driver.mixed_attention(spec, params, x, "tensorfloat32"),
        "after": lambda: driver.mixed(spec, params, x, "bfloat16"),
    }
    found = {}
    for call, run in calls.items():
        run()
        found[call], seen[:] = set(seen), []
    on = {"mixed", "mixed_vjp", "mixed_attention"}
    assert found == {call: {(call in on, "float32")} for call in calls}


def pretend(monkeypatch, capability):
    """Let every framework find a GPU of a compute capability, as far as a driver asks."""
    found = SimpleNamespace(name="/device:GPU:0", platform="gpu", compute_capability=".".join(map(str, capability)))
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda: [found])
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [found] if kind == "GPU" else [])
    details = {"compute_capability": capability}
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda device: details if device is found else {})
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.ones(1))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability if device == "cuda" else (0, 0))
    monkeypatch.setattr(jax, "devices", lambda kind: [found] if kind == "cuda" else [])


@pytest.mark.parametrize(("capability", "has_it"), [((9, 0), True), ((7, 5), False)])
@pytest.mark.parametrize("name", IS_ON)
def test_a_driver_offers_tf32_on_a_gpu_that_has_it(name, capability, has_it, monkeypatch):
    assert "tensorfloat32" not in loader.load(name).mixed_dtypes
    pretend(monkeypatch, capability)
    assert ("tensorfloat32" in loader.load(name, "cuda").mixed_dtypes) == has_it


@pytest.mark.parametrize(
    ("name", "said"),
    [("tensorflow", ", float32 without TF32"), ("torch", ", float32 products of precision 'highest'")],
)
def test_the_report_says_how_float32_is_multiplied_on_a_gpu(name, said, monkeypatch):
    pretend(monkeypatch, (9, 0))
    config = SimpleNamespace(stash=defaultdict(lambda: ([loader.load(name, "cuda")], {})))
    assert pytest_report_header(config)[-1].endswith(said)
