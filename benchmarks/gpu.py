"""Measure what a GPU shows, in less than nine minutes, and print one table.

    python benchmarks/gpu.py                          everything
    python benchmarks/gpu.py conformance megapixel    these parts, which then have all the time
    python benchmarks/gpu.py --device cpu --quick     tiny sizes, to see that it works

Each part has processes of its own and a share of the time. What fails or is not reached says so in the table.
Results are kept as they come, in benchmarks/results/<device>.json, beside earlier ones of the same commit and versions.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_table import table_of
from measuring import journal
from measuring.case import OURS, PEERS, Case
from measuring.machine import QUIET, ROOT, frameworks_of, git, slug, version_of
from measuring.subject import Subject
from nonlocal_core import cost
from nonlocal_core.files.atomic_write import replace_file

__all__ = ["Cell", "Results", "Run", "cells_of", "measure_cells", "verdicts"]

HERE = Path(__file__).parent
FORMS = ("embedded_gaussian", "dot_product", "concatenation")
PLACES = {
    "dense": (4, 128, (128, 128)),
    "res3": (8, 512, (8, 28, 28)),
    "res4": (8, 1024, (8, 14, 14)),
    "coco": (2, 1024, (50, 84)),
}
"""The batch, the channels and the spatial sizes, by name."""

QUICK = {"tiny": (2, 8, (4, 6))}
PRODUCT = {False: 8192, True: 128}
"""The size of the matrices whose product stands for what the device can do; the second one where all is tiny."""

BLOCKS = {
    "torch": (("torch", "torch_plain", *PEERS), ("eager",)),
    "compiled": (("torch", "torch_plain", "mmcv"), ("compiled", "graph")),
    "jax": (("jax", "jax_plain"), ("eager",)),
    "tensorflow": (("tensorflow", "tensorflow_plain", "tensorflow_xla", "tensorflow_xla_plain"), ("eager",)),
}
"""The parts that measure blocks: by which implementations, and how PyTorch runs them."""

SHARES = {
    "conformance": 0.4,
    "torch": 0.15,
    "compiled": 0.2,
    "jax": 0.1,
    "tensorflow": 0.1,
    "ways": 0.08,
    "megapixel": 0.08,
}
"""The parts in their order, and how the time is shared among them; what one leaves is for those after it."""

NONLOCAL = [sys.executable, "-c", "import sys; from nonlocal_core.commands.program import main; sys.exit(main())"]
"""The program, whether or not its script is on the path."""

STUCK = 90
"""The seconds without a word after which a process is ended, and its measurement given up."""

STARTS = 4
"""How often the process of a part is begun: a crash costs one measurement, and three of them a part."""

SMALL = 2**26
"""How many weights a matrix has at most that is made while the suite runs."""

LATE = "not reached in its time"

VERDICT = re.compile(r"(PASSED|FAILED|ERROR|SKIPPED|XFAIL)? ?\S*::test_check\[([^\]]+)\] ?(\w*)")
"""A line about one check, in which the suite says what became of it before the name or behind it."""

What = Mapping[str, str]
"""What a result is of: its part, and what else tells it from others."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One thing to measure in the process of a part.

    Args:
        part: the name of the part.
        place: that of the geometry, "" for a product of matrices.
        case: the configuration.
        step: "forward", "training" or "product".
    """

    part: str
    place: str
    case: Case
    step: str

    @property
    def what(self) -> What:
        """What it is, in the words of the results."""
        one = self.case
        form = "" if self.step == "product" else one.pairwise
        words = {"part": self.part, "place": self.place, "form": form, "dtype": one.dtype, "step": self.step}
        return {**words, "mode": one.mode, "by": one.backend}


def cells_of(part: str, device: str, *, quick: bool) -> list[Cell]:
    """Return what a part measures, what matters most first."""
    backends, modes = BLOCKS[part]
    dtypes = ("float32",) if quick else ("bfloat16", "float32")
    steps = ("training",) if quick else ("training", "forward")
    places = QUICK if quick else PLACES
    size = PRODUCT[quick]
    cells = [
        Cell(part, "", Case(backends[0], device, FORMS[0], "auto", size, (1,), dtype), "product") for dtype in dtypes
    ]
    for dtype, step, place, form, mode, by in itertools.product(dtypes, steps, places, FORMS, modes, backends):
        batch, channels, spatial = places[place]
        case = Case(by, device, form, "auto", channels, spatial, dtype, step == "training", batch, mode)
        if case.impossible is None:
            cells.append(Cell(part, place, case, step))
    return cells


# In the process of a part


def work(cells: Sequence[Cell], first: int, *, quick: bool) -> None:
    """Measure cells from one on, and write down when each begins and what is found."""
    for index in range(first, len(cells)):
        journal.write({"cell": index})
        try:
            found = values_of(cells[index], quick=quick)
        except Exception as error:  # noqa: BLE001 - whatever it is, the others are measured
            found = {"note": f"failed: {reason_of(error)}"}
        journal.write({"cell": index, "found": found})
        gc.collect()  # a compiled block is part of a cycle, and its graph holds memory


def warm(cells: Sequence[Cell]) -> None:
    """Compile what is measured later, by another process that finds it in a folder.

    PyTorch compiles what it runs; what takes much memory there could take it from the suite, which runs meanwhile.
    """
    for cell in cells:
        try:
            call = subject_of(cell).call
            if cell.case.backend in OURS or cell.case.batch * cell.case.positions**2 <= SMALL:
                call()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is found when that is measured
            sys.stderr.write(f"{cell.what}: {reason_of(error)}\n")


def subject_of(cell: Cell) -> Subject:
    """Return what is called."""
    one = Subject("", (), cell.case, cell.step)
    if cell.step == "product":
        one.call = one.library.product(cell.case, cell.case.channels)
    return one


def values_of(cell: Cell, *, quick: bool) -> dict[str, Any]:
    """Return what is measured."""
    budget = 0.02 if quick else 0.3
    one = subject_of(cell)
    if cell.step == "product":
        return {"seconds": one.seconds(budget), "flops": 2 * cell.case.channels**3}
    held = one.peak()  # before anything else, because a graph takes its memory when it is recorded
    spec = one.library.spec_of(cell.case)
    counted = cost(spec, cell.case.shape, cell.case.dtype, training=cell.case.training).methods[cell.case.counted]
    return {"seconds": one.seconds(budget), "flops": counted.flops, **({} if held is None else {"bytes": held})}


def reason_of(error: Exception) -> str:
    """Return what an error says, in one line that is not too long."""
    text = str(error).strip() or type(error).__name__
    return (
        "out of memory" if "out of memory" in text.lower() else f"{type(error).__name__}: {text.splitlines()[0]:.120}"
    )


# In the process that was called


class Results:
    """What was measured, in a file that is written after each result.

    Args:
        file: where it lies.
        about: the device, the commit and the versions; results of others are dropped.
    """

    def __init__(self, file: Path, about: Mapping[str, Any]) -> None:
        """Take earlier results."""
        self.file, self.about = file, dict(about)
        self.found: dict[str, dict[str, Any]] = {}
        earlier = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if {name: earlier.get(name) for name in about} == self.about:
            self.found = {json.dumps(one["what"]): one for one in earlier["results"]}

    def add(self, what: What, **found: Any) -> None:
        """Keep one result, in place of an earlier one, unless there is none this time."""
        key = json.dumps(what)
        if found.get("note") != LATE or key not in self.found:
            self.found[key] = {"what": what, **found}
        text = json.dumps({**self.about, "results": list(self.found.values())}, indent=0)
        replace_file(self.file, f"{text}\n".encode())


@dataclasses.dataclass(frozen=True)
class Run:
    """How everything is measured: where, by which frameworks, whether tiny, and in what folder the processes write."""

    device: str
    frameworks: Sequence[str]
    quick: bool
    folder: Path

    def command(self, part: str, *options: object) -> list[str]:
        """Return what measures the cells of a part."""
        quick = ["--quick"] if self.quick else []
        return [sys.executable, str(HERE / "gpu.py"), part, "--device", self.device, *quick, *map(str, options)]

    def start(self, command: Sequence[str], name: str) -> subprocess.Popen[bytes]:
        """Begin a process, in a group of its own, and keep what it says and writes in the journal."""
        environment = {**os.environ, **QUIET, journal.JOURNAL: str(self.folder / f"{name}.journal")}
        if name.partition(".")[0] in BLOCKS:
            environment["TORCHINDUCTOR_CACHE_DIR"] = str(self.folder / "inductor")
            environment["JAX_COMPILATION_CACHE_DIR"] = str(self.folder / "xla")
            environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        with (self.folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def said(self, name: str) -> str:
        """Return what a process said."""
        return (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def reason(self, name: str, *, whole: bool = True) -> str:
        """Return why a process gave no result."""
        lines = self.said(name).strip().splitlines()
        return f"failed: {lines[-1][:160] if lines else 'it said nothing'}" if whole else LATE


def ended(process: subprocess.Popen[bytes], deadline: float) -> bool:
    """Wait for a process until it is time, and end it then; return whether it ended by itself."""
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return False
    return True


def measure_cells(run: Run, results: Results, part: str, deadline: float) -> None:
    """Measure the cells of a part, in a new process after one that crashed or got stuck."""
    cells = cells_of(part, run.device, quick=run.quick)
    first, note = 0, LATE
    for start in range(STARTS):
        name = f"{part}.{start}"
        lines = run.folder / f"{name}.journal"
        lines.touch()
        process = run.start(run.command(part, "--first", first), name)
        heard, read, running = time.monotonic(), 0, True
        while running and time.monotonic() < min(deadline, heard + STUCK):
            time.sleep(0.1)
            running = process.poll() is None
            new = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines(keepends=True)[read:]]
            for line in new:
                if "found" in line:
                    results.add(cells[line["cell"]].what, **line["found"])
                    first = line["cell"] + 1
            heard, read = time.monotonic() if new else heard, read + len(new)
        ended(process, 0)
        if first == len(cells) or time.monotonic() >= deadline:
            note = LATE
            break
        note = f"out of time: more than {STUCK} s" if running else run.reason(name)
        results.add(cells[first].what, note=note)
        first += 1
    for cell in cells[first:]:
        results.add(cell.what, note=note)


def check(run: Run, results: Results, parts: Sequence[str], deadline: float) -> None:
    """Run the suite on each framework if that is asked for, and meanwhile compile what the other parts measure."""
    cores = os.cpu_count() or 1
    suites: dict[str, subprocess.Popen[bytes]] = {}
    for name in run.frameworks if "conformance" in parts else ():
        options = ["-v", *(["-k", "identity_at_start"] if run.quick else [])]
        if find_spec("xdist") is not None and not run.quick:
            options += ["-n", str(max(1, cores // (len(run.frameworks) + 1)))]
        words = ["conformance", name, "--device", run.device, "--", *options]
        suites[name] = run.start([*NONLOCAL, *words], f"conformance.{name}")
    count = max(1, cores // 4)
    others = [
        run.start(run.command(part, "--warm", index, count), f"{part}.warm{index}")
        for part, framework in (("compiled", "torch"), ("jax", "jax"))
        if part in parts and framework in run.frameworks and not run.quick
        for index in range(count)
    ]
    for process in others:
        ended(process, deadline)
    for name, process in suites.items():
        whole = ended(process, deadline)
        found = verdicts(run.said(f"conformance.{name}"))
        what = {"part": "conformance", "by": name}
        if found:
            failed = sorted(check for check, verdict in found.items() if verdict in {"FAILED", "ERROR"})
            rest = {} if whole else {"note": f"the rest {LATE}"}
            results.add(what, counts=Counter(found.values()), failed=failed, **rest)
        else:
            results.add(what, note=run.reason(f"conformance.{name}", whole=whole))


def verdicts(text: str) -> dict[str, str]:
    """Return what became of each check, by what pytest says while it runs."""
    return {name: before or after for before, name, after in VERDICT.findall(text) if before or after}


def compare_ways(run: Run, results: Results, deadline: float) -> None:
    """Compute a block with a softmax by each way."""
    file = run.folder / "ways.json"
    options = ["--quick", "--seconds", "0.02"] if run.quick else ["--seconds", "0.2"]
    words = ["--device", run.device, "--backends", "torch", "--forms", FORMS[0], "--output", str(file), *options]
    process = run.start([sys.executable, str(HERE / "thresholds.py"), *words], "ways")
    whole = ended(process, deadline)
    for row in json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else ():
        step = "training" if row["training"] else "forward"
        what = {"part": "ways", "place": f"{row['width']} wide, {row['positions']}", "form": row["form"]}
        results.add({**what, "dtype": row["dtype"], "step": step, "by": "torch"}, times=row["times"])
    rest = {"part": "ways", "place": "the rest"}
    results.found.pop(json.dumps(rest), None)
    if process.returncode != 0:
        results.add(rest, note=run.reason("ways", whole=whole))


def paint(run: Run, results: Results, deadline: float) -> None:
    """Denoise a picture of a megapixel."""
    framework, size = run.frameworks[0], "24" if run.quick else "1024"
    words = ["demo", "--size", size, "--device", run.device, "--backend", framework]
    process = run.start([*NONLOCAL, *words, "--output", str(run.folder / "demo.png")], "megapixel")
    whole = ended(process, deadline)
    row = re.search(rf"│ {framework}[^│]*((?:│[^│\n]+)+)", run.said("megapixel"))
    what = {"part": "megapixel", "place": f"{size} x {size}", "by": framework}
    if row is None:
        results.add(what, note=run.reason("megapixel", whole=whole))
    else:
        _, seconds, psnr, difference, held = (cell.strip() for cell in row[1].split("│")[1:6])
        memory = {} if held == "-" else {"bytes": 2**20 * float(held.split()[0].replace(",", ""))}
        results.add(what, seconds=float(seconds), psnr=psnr, difference=difference, **memory)


def commit() -> str:
    """Return the commit that is measured, with a plus sign where files differ from it."""
    try:
        changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "HEAD").strip() + ("+" if changed else "")
    except (RuntimeError, OSError):
        return "unknown"


def measure(run: Run, results: Results, parts: Sequence[str], end: float) -> None:
    """Measure the parts, each in its share of the time that is left."""
    first = ["conformance"] if {"conformance", "compiled", "jax"} & set(parts) else []
    order = first + [part for part in SHARES if part in parts and part != "conformance"]
    for index, part in enumerate(order):
        now = time.monotonic()
        deadline = now + (end - now) * SHARES[part] / sum(SHARES[one] for one in order[index:])
        sys.stdout.write(f"{part}: at most {deadline - now:.0f} s\n")
        sys.stdout.flush()
        if part == "conformance":
            check(run, results, parts, deadline)
        elif part == "megapixel":
            paint(run, results, deadline)
        elif {"compiled": "torch", "ways": "torch"}.get(part, part) in run.frameworks:
            compare_ways(run, results, deadline) if part == "ways" else measure_cells(run, results, part, deadline)


def main() -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"some of {', '.join(SHARES)} (default: all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--seconds", type=float, default=520, help="the time for everything (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the results are kept")
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--warm", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    unknown = [part for part in args.parts if part not in SHARES]
    if unknown:
        parser.error(f"`part` must be some of {', '.join(SHARES)}. Got {unknown[0]!r}.")
    if args.first is not None or args.warm is not None:
        cells = cells_of(args.parts[0], args.device, quick=args.quick)
        if args.warm is None:
            work(cells, args.first, quick=args.quick)
        else:
            warm(cells[args.warm[0] :: args.warm[1]])
        return 0
    end = time.monotonic() + args.seconds
    seen, missing = frameworks_of(args.device)
    if not seen:
        sys.stderr.write("benchmarks: error: this needs a GPU that PyTorch, JAX or TensorFlow sees. Got none.\n")
        return 2
    missing |= {peer: "it is not installed" for peer in PEERS if find_spec(peer) is None}
    sys.stdout.write("".join(f"left out: {name}: {reason}\n" for name, reason in missing.items()))
    device = next(iter(seen.values()))
    about: dict[str, Any] = {
        "device": device,
        "commit": commit(),
        "versions": {name: version_of(name) for name in seen},
    }
    results = Results(args.output or HERE / "results" / f"{slug(device)}.json", about)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(args.device, list(seen), args.quick, Path(folder))
        measure(run, results, args.parts or list(SHARES), end)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    sys.stdout.write(f"\n{device}, commit {about['commit']}, {versions}\n\n{table_of(results.found.values())}")
    sys.stdout.write(f"\nThe results are in {os.path.relpath(results.file)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
