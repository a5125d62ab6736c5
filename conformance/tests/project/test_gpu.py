"""What measures a GPU, on a machine without one: that it measures, and what it says of what fails."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nonlocal_core import nonlocal_block, nonlocal_block_vjp, planning

ROOT = Path(__file__).parents[3]
sys.path.append(str(ROOT / "benchmarks"))  # a folder of programs, no package

import by_width  # noqa: E402
import gpu  # noqa: E402
import run as program  # noqa: E402
from gpu_table import table_of  # noqa: E402
from measuring import machine  # noqa: E402
from measuring.arrays import input_of, params_of  # noqa: E402
from measuring.case import Case  # noqa: E402
from measuring.subject import Subject  # noqa: E402


def cells(table):
    """Return the rows of a table as lists of the text of their cells."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


def measured(part, folder, seconds=120):
    """Return what a part leaves in its file, and its rows of the table."""
    results = gpu.Results(folder / "results.json", {"device": "cpu"})
    run = gpu.Run("cpu", [part], quick=True, folder=folder)
    gpu.measure_cells(run, results, part, time.monotonic() + seconds)
    kept = json.loads((folder / "results.json").read_text(encoding="utf-8"))["results"]
    assert kept == list(results.found.values())
    assert {json.dumps(one["what"]) for one in kept} == {
        json.dumps(one.what) for one in gpu.cells_of(part, "cpu", quick=True)
    }
    return kept, cells(table_of(kept))


def test_a_part_measures_this_library_and_the_plain_matrix(tmp_path):
    kept, rows = measured("torch", tmp_path)
    assert all(0 < one["seconds"] < 60 and one["flops"] > 0 for one in kept)
    assert [row[1].split()[1] for row in rows[1:]] == list(gpu.FORMS)
    for _, _, ours, other, times, *_ in rows[1:]:
        assert ours.endswith("s")
        assert "torch_plain" in other or "mmcv" in other
        assert float(times) > 0


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise RuntimeError('no such kernel')", "failed: RuntimeError: no such kernel"),
        ("print('a fault of a kernel', flush=True); import os; os._exit(3)", "failed: a fault of a kernel"),
        ("import time; time.sleep(60)", "out of time: more than 1.5 s"),
    ],
)
def test_a_part_that_fails_is_reported_and_not_dropped(code, words, tmp_path, monkeypatch):
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text(code, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu, "STUCK", 1.5)
    monkeypatch.setattr(gpu, "STARTS", 2)
    kept, rows = measured("jax", tmp_path)
    assert {one["note"] for one in kept} == {words}
    assert [row[2] for row in rows] == [words] * 4
    assert [row[3] for row in rows[1:]] == [f"{words} jax_plain"] * 3


def test_what_a_part_does_not_reach_is_said_and_replaces_nothing(tmp_path):
    results = gpu.Results(tmp_path / "results.json", {"device": "cpu"})
    first, *rest = gpu.cells_of("torch", "cpu", quick=True)
    results.add(first.what, seconds=1.0, flops=2)
    gpu.measure_cells(gpu.Run("cpu", ["torch"], quick=True, folder=tmp_path), results, "torch", time.monotonic())
    again = gpu.Results(tmp_path / "results.json", {"device": "cpu"}).found.values()
    assert [one.get("note") for one in again] == [None, *["not reached in its time"] * len(rest)]
    assert gpu.Results(tmp_path / "results.json", {"device": "other"}).found == {}


BLIND = {"torch": "raise RuntimeError('no GPU')"}


def test_without_a_gpu_nothing_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(machine, "PROBES", BLIND)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 2
    assert capsys.readouterr().err == (
        "benchmarks: error: this needs a GPU that PyTorch, JAX or TensorFlow sees. Got none.\n"
    )


@pytest.mark.parametrize("framework", ["torch", "jax", "tensorflow"])
def test_what_looks_for_a_device_is_python(framework):
    compile(machine.PROBES[framework].format("cuda", "GPU"), framework, "exec")


def test_the_suite_of_asv_measures_on_a_gpu_what_sees_one(monkeypatch, capsys):
    monkeypatch.setattr(program, "DEVICES", ("cuda",))
    cases = [(backend, "cuda", "dot_product", "forward", 1024) for backend in ("torch", "torch_matrix", "jax")]
    plan = {"scaling.Scaling": cases, "imports.Import": [("nonlocal_jax",)]}
    monkeypatch.setattr(machine, "PROBES", {"torch": "name = 'a chip'", "jax": BLIND["torch"]})
    assert program.chosen(plan, []) == {**plan, "scaling.Scaling": cases[:2]}
    assert capsys.readouterr().out == "left out: jax: RuntimeError: no GPU\n"
    monkeypatch.setattr(machine, "PROBES", BLIND)
    with pytest.raises(RuntimeError, match=r"must see the GPU; .* Got none\."):
        program.chosen(plan, [])


def test_a_gpu_is_timed_between_two_of_its_events(monkeypatch):
    one = Subject("", (), Case("torch", "cpu", "dot_product", "auto", 4, (3, 4)), "forward")
    said = []
    times = iter((2.0, 100.0, 3.0))

    class Event:
        def __init__(self, *, enable_timing):
            assert enable_timing

        def record(self):
            said.append("event")

        def synchronize(self):
            said.append("wait")

        def elapsed_time(self, _):
            return next(times)

    monkeypatch.setattr(one.library.torch.cuda, "Event", Event)
    monkeypatch.setattr(one.library, "_wait", lambda _: said.append("wait"))
    one.call = one.library.partial(one.call.func, one.case, lambda: said.append("call"))
    one.case = by_width.dataclasses.replace(one.case, device="cuda")
    assert one.seconds(0.104) == 0.003
    assert said == ["call", "wait", *["event", "call", "event", "wait"] * 3]


def test_what_became_of_each_check_is_read_from_what_the_suite_says():
    name = "a/test_conformance.py::test_check[torch-{}-gaussian_1d-float64]"
    text = (
        f"{name.format('one')} \n[gw1] [  0%] PASSED {name.format('one')} \n{name.format('two')} FAILED [ 50%]\n"
        f"{name.format('three')} \nFAILED {name.format('two')} - AssertionError\n"
    )
    found = gpu.verdicts(text)
    assert found == {"torch-one-gaussian_1d-float64": "PASSED", "torch-two-gaussian_1d-float64": "FAILED"}


def test_the_table_compares_with_the_best_other_and_with_the_product():
    what = {"part": "torch", "place": "res4", "form": "dot_product", "dtype": "bfloat16", "step": "training"}
    product = {**what, "place": "", "form": "", "step": "product", "mode": "eager", "by": "torch"}
    eager = {**what, "mode": "eager"}
    suite = {"counts": {"PASSED": 1280, "FAILED": 2}, "failed": ["jax-memory-a", "jax-memory-b"]}
    rows = cells(
        table_of(
            [
                {"what": product, "seconds": 1e-3, "flops": 10**12},
                {"what": {**eager, "by": "torch"}, "seconds": 2e-3, "flops": 10**12, "bytes": 2**20},
                {"what": {**eager, "by": "mmcv"}, "note": "out of memory"},
                {"what": {**eager, "by": "torch_plain"}, "seconds": 6e-3, "flops": 1, "bytes": 2**21},
                {"what": {**eager, "by": "timm"}, "seconds": 8e-3, "flops": 1},
                {"what": {**what, "mode": "graph", "by": "torch"}, "note": "out of memory"},
                {"what": {**what, "mode": "graph", "by": "mmcv"}, "note": "out of memory"},
                {"what": {"part": "conformance", "by": "jax"}, **suite},
                {"what": {"part": "ways"}, "times": {"auto": 3e-3, "matrix": 1.5e-3, "fused": "ValueError: no kernel"}},
            ]
        )
    )
    assert [row[2:] for row in rows] == [
        ["1e+03 TFLOP/s", *[""] * 5],
        ["2 ms", "6 ms torch_plain", "3.00", "1 MiB", "2 MiB", "50%"],
        ["out of memory", "out of memory mmcv", *[""] * 4],
        ["1,280 passed, 2 failed; memory 2", *[""] * 5],
        ["3 ms", "1.5 ms matrix, fused: ValueError: no kernel", "0.50", *[""] * 3],
    ]


@pytest.mark.parametrize("form", gpu.FORMS)
@pytest.mark.parametrize("backend", ["torch_plain", "jax_plain", "tensorflow_plain"])
def test_the_plain_matrix_computes_the_block_and_its_gradient(backend, form):
    case = Case(backend, "cpu", form, "auto", 6, (3, 5), batch=2)
    params = {name: array.astype(np.float64) for name, array in params_of(case.spec).items()}
    x, dz = (input_of(case.shape, seed).astype(np.float64) for seed in (0, 2))
    forward = Subject("", (), case, "forward")
    expected = nonlocal_block(x, params, case.spec)
    np.testing.assert_allclose(forward.library.to_numpy(forward.run()), expected, atol=1e-5 * np.abs(expected).max())
    result = Subject("", (), by_width.dataclasses.replace(case, training=True), "training").run()
    dx = forward.library.to_numpy(result[1 if backend == "jax_plain" else 0])
    expected, _ = nonlocal_block_vjp(x, params, case.spec, dz, training=True)
    np.testing.assert_allclose(dx, expected, atol=1e-4 * np.abs(expected).max())


def test_each_way_is_the_one_that_its_name_says(monkeypatch):
    plans = []
    plan = planning.plan
    monkeypatch.setattr(planning, "plan", lambda *args, **options: plans.append(plan(*args, **options)) or plans[-1])
    case = Case("torch", "cpu", "embedded_gaussian", "auto", 8, (16,))
    for way in ("matrix", "fused", "chunks"):
        by_width.call_of(case, way)()
    assert [one.method for one in plans] == ["pairwise", "streamed", "streamed"]
    assert plans[1].rows is None
    assert plans[2].rows > 0


def test_ways_are_kept_beside_those_of_other_forms(tmp_path):
    file = tmp_path / "ways.json"
    for form in ("dot_product", "concatenation", "concatenation"):
        by_width.measure("cpu", "a chip", file, ["torch"], [form], 0.001, quick=True)
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 16
    ways = {row["form"]: set(row["times"]) for row in rows}
    assert ways == {
        "dot_product": {"auto", "matrix", "reassociated"},
        "concatenation": {"auto", "matrix", "sorted"},
    }
    assert all(time > 0 for row in rows for time in row["times"].values())


def test_the_tables_of_the_planner_are_read_off():
    def row(width, positions, training=True, **times):
        words = {"backend": "torch", "form": "embedded_gaussian", "dtype": "bfloat16", "training": training}
        return {**words, "width": width, "positions": positions, "times": times}

    rows = [
        row(64, 256, matrix=3.0, fused=2.0, chunks=4.0),
        row(128, 256, matrix=2.0, fused=3.0, chunks=4.0),
        row(128, 512, matrix=4.0, fused=3.0, chunks=4.0),
        row(512, 256, matrix=1.0, fused="ValueError: no kernel", chunks=2.0),
        row(512, 512, matrix=1.0, fused="ValueError: no kernel", chunks=2.0),
        row(512, 1024, matrix="out of memory", chunks=2.0),
    ]
    assert by_width.tables(rows)["torch"] == {
        "FUSED": {"bfloat16": 128},
        "AHEAD": {"bfloat16": 64},
        "LIMITS": {"streamed, training": by_width.BATCH * 256**2},
        "WIDE": by_width.BATCH * 512**2,
    }
