"""Run asv on part of the suite, say how far it is, and keep the reasons beside the results."""

from __future__ import annotations

import itertools
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from asv.machine import Machine, MachineCollection

from compact import compact, whole
from measuring import PRELOAD
from measuring.case import DEVICES, Case
from measuring.journal import JOURNAL
from measuring.machine import QUIET, ROOT, git, gpu_name, slug
from measuring.subject import LIMIT
from plans import Plan

__all__ = ["CONFIG", "HERE", "ROOT", "WORK", "asv", "case_of", "commit", "git", "measured", "this_machine"]

HERE = Path(__file__).parent
CONFIG = HERE / "asv.conf.json"
WORK = ROOT / ".venv" / "asv"
"""What is not kept."""

_KINDS = ("time_", "timeraw_", "track_")


def commit(name: str) -> str:
    """Return the hash of a commit."""
    return git("rev-parse", "--verify", f"{name}^{{commit}}").strip()


def asv(config: Path, *arguments: str) -> str:
    """Return what asv prints.

    Raises:
        RuntimeError: if it fails.
    """
    command = [sys.executable, "-m", "asv", "--config", str(config), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        message = f"asv failed:\n{done.stdout}{done.stderr}"
        raise RuntimeError(message)
    return done.stdout


def this_machine() -> str:
    """Return a name of this machine that says what it is and not who it is, after making it known to asv."""
    found = Machine.get_defaults()
    name = f"{found['arch']}-{found['num_cpu']}cpu"
    if DEVICES == ("cuda",):
        name = f"{slug(gpu_name())}-gpu"
    # Of what a virtual machine has, some bytes differ each time, and asv would take it for another machine.
    ram = str(round(int(found["ram"]) / 2**30) * 2**30)
    MachineCollection.save(name, {**found, "machine": name, "os": platform.system(), "ram": ram})
    return name


def measured(plan: Plan, config: Path, stamp: str, *, limit: int, python: str | None = None) -> int:
    """Measure a plan and keep the results, a part after the other, so that little is lost by an interruption.

    Args:
        plan: what to measure; a class without a case is passed over.
        config: the settings of asv, which say where the results lie.
        stamp: the commit whose results they are.
        limit: the seconds that one benchmark of one case may take.
        python: the interpreter. None: this one.

    Returns:
        0, or 1 if something failed for a reason that is not known.
    """
    machine = this_machine()
    folder = HERE / json.loads(config.read_text(encoding="utf-8"))["results_dir"]
    file = folder / machine / f"{stamp[:8]}-python{'.'.join(platform.python_version_tuple()[:2])}.json"
    total = sum(len(cases) * _processes(name) for name, cases in plan.items())
    done, start, failed = 0, time.monotonic(), False
    _say(f"{total} measurements of {stamp[:8]} on {machine}")
    WORK.mkdir(parents=True, exist_ok=True)
    for name, library, cases, modules in _parts(plan):
        notes = _opened(file, name)
        for case in cases:
            notes.get(name, {}).pop(_key(case), None)
        command = ["run", "--show-stderr", "--machine", machine, "--set-commit-hash", stamp]
        command += [] if python is None else ["--environment", f"here:{python}"]
        for line in _run(config, [*command, "--bench", _regex(name, cases)], limit, modules):
            _progress(line, done, total, start)
            done += line["note"] is None
            if line["note"] is not None:
                notes.setdefault(name, {})[", ".join(line["params"])] = line["note"]
        _kept(file, notes)
        failed |= _explain(file, name, cases, notes, WORK / f"{name}.{library}.log")
    _say(f"{time.monotonic() - start:.0f} s; the results are in {os.path.relpath(file, ROOT)}")
    return int(failed)


def case_of(name: str, params: Iterable[object]) -> Case | None:
    """Return what the parameters of a class mean; None: they are no configuration of a block."""
    case = getattr(_class(name), "case", None)
    return None if case is None else case(*params)


def _parts(plan: Plan) -> Iterator[tuple[str, str, list[tuple[object, ...]], list[str]]]:
    """Yield a class, a framework, the cases that need it ("" for those that need none) and the modules to import."""
    for name, cases in plan.items():
        parts: dict[str, list[tuple[object, ...]]] = defaultdict(list)
        modules: dict[str, set[str]] = defaultdict(set)
        for params in cases:
            case = case_of(name, params)
            library = "" if case is None else case.library
            parts[library].append(params)
            modules[library] |= set() if case is None else case.modules
        for library, part in parts.items():
            yield name, library, part, sorted(modules[library])


def _class(name: str) -> Any:
    module, _, own = name.partition(".")
    return getattr(import_module(f"suite.{module}"), own)


def _processes(name: str) -> int:
    """Return how many processes asv starts for a case: a round of a time is one, so that minutes lie between them."""
    functions = [one for one in vars(_class(name)) if one.startswith(_KINDS)]
    return sum(1 if one.startswith("track_") else getattr(_class(name), "rounds", 1) for one in functions)


def _axes(name: str) -> list[list[str]]:
    """Return the values of the parameters of a class, as asv writes them."""
    params = _class(name).params
    return [[repr(value) for value in axis] for axis in (params if isinstance(params[0], tuple) else (params,))]


def _regex(name: str, cases: Iterable[Sequence[object]]) -> str:
    """Return what selects these combinations: asv starts a process even for one that is skipped at once."""
    return rf"^{re.escape(name)}\.\w+\((?:{'|'.join(re.escape(_key(case)) for case in cases)})\)$"


def _key(params: Iterable[object]) -> str:
    return ", ".join(map(repr, params))


def _run(config: Path, command: Sequence[str], limit: int, modules: list[str]) -> Iterator[dict[str, Any]]:
    """Run asv, which imports modules beforehand, and yield what its benchmarks write in the journal, when they do."""
    journal, log = WORK / "journal", WORK / "log"
    journal.write_text("", encoding="utf-8")
    environment = {**os.environ, JOURNAL: str(journal), LIMIT: str(limit), **QUIET}
    environment[PRELOAD] = " ".join(modules)
    arguments = [sys.executable, "-m", "asv", "--config", str(config), *command]
    with (
        log.open("w", encoding="utf-8") as output,
        subprocess.Popen(arguments, stdout=output, stderr=output, env=environment) as process,
        journal.open(encoding="utf-8") as lines,
    ):
        running = True
        while running:
            running = process.poll() is None
            yield from map(json.loads, lines)
            time.sleep(0.2)
    if process.returncode == 1:  # 2 is a benchmark that failed
        message = f"asv failed:\n{log.read_text(encoding='utf-8')}"
        raise RuntimeError(message)


def _progress(line: dict[str, Any], done: int, total: int, start: float) -> None:
    """Say which measurement begins, or why it gives no number."""
    if line["note"] is not None:
        _say(f"{'':10}{line['note']}")
    else:
        words = " ".join(param.strip("'") for param in line["params"])
        _say(f"{done + 1:4d}/{total} {time.monotonic() - start:5.0f} s  {line['benchmark'].partition('.')[2]} {words}")


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _opened(file: Path, name: str) -> dict[str, dict[str, str]]:
    """Make earlier results of a class ready for asv to add to, and return the reasons, which it would drop."""
    if not file.exists():
        return {}
    data = json.loads(file.read_text(encoding="utf-8"))
    axes = _axes(name)
    for benchmark, columns in data["results"].items():
        if benchmark.rpartition(".")[0] == name:
            data["results"][benchmark] = whole(columns, axes)
    _write(file, data)
    return data.get("notes", {})


def _kept(file: Path, notes: dict[str, dict[str, str]]) -> None:
    """Make the results small, and put the reasons back."""
    data = json.loads(file.read_text(encoding="utf-8"))
    results = {benchmark: compact(columns) for benchmark, columns in data["results"].items()}
    _write(file, {**data, "results": results, "notes": notes})


def _write(file: Path, data: dict[str, Any]) -> None:
    file.write_text(json.dumps(data, separators=(",", ":")), encoding="utf-8")


def _explain(
    file: Path, name: str, cases: Iterable[Sequence[object]], notes: dict[str, dict[str, str]], kept: Path
) -> bool:
    """Say what failed for no reason that is known, and where to read about it; return whether anything did."""
    wanted = {_key(case) for case in cases} - notes.get(name, {}).keys()
    failed = []
    for benchmark, (values, axes, *_) in json.loads(file.read_text(encoding="utf-8"))["results"].items():
        if benchmark.rpartition(".")[0] == name:
            keys = [", ".join(params) for params in itertools.product(*axes)]
            results = [None] * len(keys) if values is None else values
            pairs = zip(keys, results, strict=True)
            failed += [f"{benchmark}({key})" for key, value in pairs if value is None and key in wanted]
    for one in failed:
        _say(f"failed: {one}")
    if failed:
        kept.write_bytes((WORK / "log").read_bytes())
        _say(f"what it said is in {os.path.relpath(kept, ROOT)}")
    return bool(failed)
