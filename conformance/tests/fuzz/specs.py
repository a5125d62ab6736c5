"""Random blocks, computed twice: `python conformance/tests/fuzz/specs.py torch 2000` compares them with the reference.

Specs, shapes, masks and what stands behind them, methods and dtypes are drawn; values, statistics, attention and
gradients are compared. The reference itself, "numpy", is compared with the textbook of the tests, which shares no
arithmetic with it. A count such as 600s is one of seconds. What differs is printed as a program that repeats it.
"""

import argparse
import contextlib
import dataclasses
import functools
import math
import sys
import time
import traceback
from pathlib import Path

import numpy as np
from amounts import amount
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from nonlocal_conformance import loader
from nonlocal_conformance.capabilities import BACKENDS
from nonlocal_conformance.drivers.numpy import NumpyDriver
from nonlocal_conformance.registry import methods_of
from nonlocal_conformance.strategies import cases

TOLERANCES = {"float64": 1e-8, "float32": 2e-3}
"""Relative to the largest value: random numbers may cancel, so what is computed is compared and not its last digits."""
HIDDEN = (None, np.nan, np.inf, -np.inf)
SEED = 0


@st.composite
def calls(draw, driver):
    """Draw a case, a dtype, a method, and what stands at masked positions."""
    case = draw(cases())
    # The textbook stacks samples, so that it needs one.
    batch = draw(st.integers(1 if driver.name == "numpy" else 0, 3))
    training = batch * math.prod(case.spatial) > 1 and draw(st.booleans())  # of one value there are no statistics
    mask = draw(st.sampled_from([None, "some", "some", "all"])) if batch else None
    case = dataclasses.replace(case, batch=batch, mask=mask, training=training, ties=draw(st.booleans()))
    dtype, method = (
        draw(st.sampled_from(driver.dtypes)),
        draw(st.sampled_from(["auto", *methods_of(driver, case.spec)])),
    )
    return case, dtype, method, draw(st.sampled_from(HIDDEN)) if mask else None


def driver_of(name):
    """Return the driver of a backend; that of the reference keeps the variance that the textbook keeps."""
    return NumpyDriver(unbiased=True) if name == "numpy" else loader.load(name)


@functools.cache
def oracle_of(driver):
    """Return what a driver is compared with."""
    if driver.name != "numpy":
        return NumpyDriver(unbiased=driver.unbiased)
    sys.path.insert(0, str(Path(__file__).parents[1] / "meta"))
    import torch
    from textbook import Textbook

    torch.set_num_threads(1)  # arrays this small only wait for other threads
    return Textbook()


def results(driver, case, data, method):
    """Return all that a driver computes of a case, by name."""
    spec, params, x, dz, mask = case.spec, data.params, data.x, data.dz, data.key_mask
    z, statistics = driver.block(spec, params, x, mask, training=case.training, method=method)
    dx, dparams = driver.vjp(spec, params, x, dz, mask, training=case.training, method=method)
    found = {"z": z, "attention": driver.attention(spec, params, x, None, mask), "dx": dx}
    return found | {f"d{name}": a for name, a in dparams.items()} | statistics


def agree(driver, case, dtype="float64", method="auto", hidden=None):
    """Raise an `AssertionError` where a driver and the reference, or the textbook, differ."""
    data = case.data(dtype)
    if hidden is not None and data.key_mask is not None:
        for array in (data.x, data.dz):
            array[~data.key_mask] = hidden
    actual = results(driver, case, data, method)
    expected = results(oracle_of(driver), case, data.wide(), "pairwise" if driver.name != "numpy" else "auto")
    assert actual.keys() == expected.keys(), (sorted(actual), sorted(expected))
    gradients = [a[np.isfinite(a)] for name, a in expected.items() if name.startswith("d")]
    largest = max((np.abs(a).max() for a in gradients if a.size), default=0.0)
    for name, wanted in expected.items():
        got = np.asarray(actual[name])
        assert (got.shape, got.dtype.name) == (np.shape(wanted), dtype), f"{name}: {got.shape} {got.dtype}"
        size = (
            max(1.0, largest) if name.startswith("d") else max(1.0, np.abs(wanted[np.isfinite(wanted)]).max(initial=0))
        )
        np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCES[dtype] * size, err_msg=name)


def program(driver, case, dtype, method, hidden):
    """Return a program that compares once more."""
    inf_or_nan = None if hidden is None else f'float("{hidden}")'
    options = {**case.options, "bias": dict(case.options["bias"])}
    case = dataclasses.replace(case, options=options)
    return (
        'import sys; sys.path.insert(0, "conformance/tests/fuzz")\n'
        "import specs\nfrom nonlocal_conformance.cases import Case\n"
        f"case = {case!r}\n"
        f"specs.agree(specs.driver_of({driver.name!r}), case, {dtype!r}, {method!r}, {inf_or_nan})\n"
    )


def main(name, most):
    """Compare random blocks, print a program for each that differs and return their number."""
    driver, start, counts = driver_of(name), time.monotonic(), {"same": 0, "different": 0}

    @seed(SEED)
    @settings(
        max_examples=10**9 if isinstance(most, float) else most,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(call=calls(driver))
    def compare(call):
        if isinstance(most, float) and time.monotonic() - start > most:
            raise KeyboardInterrupt
        try:
            agree(driver, *call)
        except Exception:  # noqa: BLE001 - whatever goes wrong in a block is told
            counts["different"] += 1
            last = traceback.format_exc().strip().splitlines()[-12:]
            sys.stdout.write(program(driver, *call) + "".join(f"# {line}\n" for line in last) + "\n")
            sys.stdout.flush()
        else:
            counts["same"] += 1

    with contextlib.suppress(KeyboardInterrupt):
        compare()
    sys.stdout.write(f"{name}: {sum(counts.values())} blocks in {time.monotonic() - start:.0f} s, {counts}\n")
    return counts["different"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("backend", choices=BACKENDS)
    parser.add_argument("most", type=amount, help="how many blocks, or for how long, such as 600s")
    args = parser.parse_args()
    sys.exit(min(1, main(args.backend, args.most)))
