"""Run the benchmarks: `quick`, `full` or `compare BASE`, all of which take names of classes, or `publish`."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import venv
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from compact import narrowed
from measuring.case import DEVICES, OURS, PEERS
from measuring.machine import frameworks_of
from page import make_local
from plans import PLANS, Plan
from record import CONFIG, HERE, ROOT, WORK, asv, case_of, commit, git, measured, this_machine

__all__: list[str] = []

LIMITS = {"quick": 120, "full": 300}
"""The seconds that one benchmark of one case may take."""

FACTOR = "1.1"
"""What is no change: a ratio below this."""


def main() -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=(*PLANS, "compare", "publish"))
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    try:
        if args.what == "publish":
            return publish()
        check_clean()
        if args.what == "compare":
            return compare(args.names)
        plan = chosen(PLANS[args.what](), args.names)
        return measured(plan, CONFIG, commit("HEAD"), limit=LIMITS[args.what])
    except RuntimeError as error:
        sys.stderr.write(f"benchmarks: error: {error}\n")
        return 2


def check_clean() -> None:
    """Refuse to measure what no commit holds; results are no part of what is measured.

    Raises:
        RuntimeError: if a file is changed or unknown to git.
    """
    changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results").splitlines()
    if changed:
        message = (
            "the working tree must be committed, because results bear the name of its commit. "
            f"Got {len(changed)} changed, such as {changed[0].split(maxsplit=1)[1]}."
        )
        raise RuntimeError(message)


def chosen(plan: Plan, names: Sequence[str]) -> Plan:
    """Return what can be measured here, of the classes that are named or else of all.

    Raises:
        RuntimeError: if there is no such class, or no framework sees the GPU that is there.
    """
    known = {name.partition(".")[2]: name for name in plan}
    unknown = [name for name in names if name not in known]
    if unknown:
        message = f"`names` must be some of {', '.join(known)}. Got {unknown[0]!r}."
        raise RuntimeError(message)
    kept = [known[name] for name in names] if names else list(plan)
    seen: Collection[str] = set(OURS.values())
    if DEVICES == ("cuda",):
        seen, missing = frameworks_of("cuda")
        sys.stdout.write("".join(f"left out: {name}: {reason}\n" for name, reason in missing.items()))
        if not seen:
            message = "PyTorch, JAX or TensorFlow must see the GPU; NONLOCAL_BENCH_DEVICE=cpu does without. Got none."
            raise RuntimeError(message)
    return {name: [params for params in plan[name] if is_possible(name, params, seen)] for name in kept}


def is_possible(name: str, params: tuple[object, ...], frameworks: Collection[str]) -> bool:
    """Return whether there is something to measure by these frameworks."""
    case = case_of(name, params)
    return case is None or (case.impossible is None and case.library in frameworks)


def compare(names: Sequence[str]) -> int:
    """Measure this project, without other implementations, at a commit and at HEAD, both by the suite of HEAD.

    Args:
        names: the commit, and of what classes; all if none is named.

    Raises:
        RuntimeError: if no commit is named, or there is no such commit or class.
    """
    if not names:
        message = "`BASE` must be a commit, as in make bench-compare BASE=HEAD~1. Got none."
        raise RuntimeError(message)
    base, head = commit(names[0]), commit("HEAD")
    plan = chosen(PLANS["quick"](), names[1:])
    ours = {name: [params for params in cases if params[0] not in PEERS] for name, cases in plan.items()}
    failed = 0
    with results_in("compare") as (config, _):
        for stamp in (base, head):
            with checked_out(stamp) as tree:
                failed |= measured(ours, config, stamp, limit=LIMITS["quick"], python=interpreter(tree))
        options = ("--split", "--factor", FACTOR, "--machine", this_machine())
        table = asv(config, "compare", *options, base, head)
    lines = [line for line in table.splitlines() if not re.match(r"\|\s+\| n/a\s+\| n/a", line)]
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return failed


@contextmanager
def results_in(name: str) -> Iterator[tuple[Path, Path]]:
    """Yield settings of asv whose results are in a folder of their own, and that folder, which is not there yet."""
    folder = WORK / name
    shutil.rmtree(folder, ignore_errors=True)
    settings = json.loads(CONFIG.read_text(encoding="utf-8"))
    config = CONFIG.with_name(f".{name}.conf.json")  # beside the other, for paths in it are relative
    config.write_text(json.dumps({**settings, "results_dir": str(folder)}), encoding="utf-8")
    try:
        yield config, folder
    finally:
        config.unlink()


@contextmanager
def checked_out(stamp: str) -> Iterator[Path]:
    """Yield a folder with the files of a commit."""
    tree = WORK / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    git("worktree", "prune")
    git("worktree", "add", "--detach", str(tree), stamp)
    try:
        yield tree
    finally:
        git("worktree", "remove", "--force", str(tree))


def interpreter(tree: Path) -> str:
    """Return an interpreter with the packages of this one, but this project as it is in `tree`."""
    folder = WORK / "environment"
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    own = next(path for path in map(Path, sys.path) if path.name == "site-packages")
    # A folder that is named here is searched, but what it names itself, such as this checkout, is not.
    paths = (tree, tree / "backends", tree / "conformance", own)
    (packages / "base.pth").write_text("".join(f"{path}\n" for path in paths), encoding="utf-8")
    return str(folder / "bin" / "python")


def publish() -> int:
    """Make the pages of all results, with all that they need.

    Raises:
        RuntimeError: if there are no results.
    """
    machines = [file.parent for file in (HERE / "results").glob("*/machine.json")]
    if not machines:
        message = "there must be results, which `make bench` writes. Got none in benchmarks/results."
        raise RuntimeError(message)
    with results_in("published") as (config, folder):
        found = []
        for machine in machines:
            shutil.copytree(machine, folder / machine.name)
            files = (file for file in machine.glob("*.json") if file.name != "machine.json")
            found += [json.loads(file.read_text(encoding="utf-8"))["results"] for file in files]
        about = json.loads((HERE / "results" / "benchmarks.json").read_text(encoding="utf-8"))
        (folder / "benchmarks.json").write_text(json.dumps(narrowed(about, found)), encoding="utf-8")
        sys.stdout.write(asv(config, "publish", "--no-pull"))
    make_local(HERE / "html")
    folder = (HERE / "html").relative_to(ROOT)
    sys.stdout.write(f"To look at it: python -m http.server -d {folder} 8000, then http://localhost:8000\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
