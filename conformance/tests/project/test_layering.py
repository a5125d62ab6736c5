"""Who may import whom: the core no framework, an adapter its own, the suite an adapter in its driver."""

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
BACKENDS = ROOT / "backends"
SUITE = ROOT / "conformance" / "nonlocal_conformance"
CORE = ROOT / "nonlocal_core"

FRAMEWORKS = {
    "nonlocal_torch": {"torch"},
    "nonlocal_tensorflow": {"keras", "tensorflow"},
    "nonlocal_jax": {"flax", "jax"},
}
ADAPTERS = sorted(path.name for path in BACKENDS.iterdir() if (path / "__init__.py").exists())
FOREIGN = set(FRAMEWORKS).union(*FRAMEWORKS.values())
# Parameters travel between backends as NumPy arrays, so an adapter may name them.
SHARED = {*sys.stdlib_module_names, "nonlocal_core", "numpy"}


def imported(source):
    """Return the top-level names of the absolute imports in a module, those inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module)
        elif isinstance(node, ast.Call) and _called(node) in {"import_module", "__import__"}:
            names |= {str(a.value) for a in node.args[:1] if isinstance(a, ast.Constant)}
    return {name.partition(".")[0] for name in names}


def _called(call):
    return getattr(call.func, "attr", getattr(call.func, "id", None))


def modules(folder):
    """Return a test parameter for each module below `folder`."""
    return [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in sorted(folder.rglob("*.py"))]


def forbidden_to_adapter(source, adapter):
    """Return what a module of an adapter imports and must not."""
    return imported(source) - SHARED - FRAMEWORKS[adapter] - {adapter}


def forbidden_to_suite(source, module):
    """Return what a module of the suite imports and must not; `module` is its path within the suite."""
    own = f"nonlocal_{Path(module).stem}"
    allowed = (
        {own, *FRAMEWORKS.get(own, ())} if Path(module).parent.name in {"drivers", "networks", "sharded"} else set()
    )
    return imported(source) & FOREIGN - allowed


def loaded(statement, path=(), names=FOREIGN):
    """Return which of some modules, the frameworks and adapters, a fresh interpreter has loaded after `statement`."""
    code = f"import sys; {statement}; print(*sorted({names!r} & sys.modules.keys()))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_there_is_an_adapter_to_look_at():
    assert "nonlocal_torch" in ADAPTERS
    assert set(ADAPTERS) <= set(FRAMEWORKS)


@pytest.mark.parametrize("path", modules(BACKENDS))
def test_an_adapter_imports_only_the_core_and_its_framework(path):
    adapter = path.relative_to(BACKENDS).parts[0]
    assert forbidden_to_adapter(path.read_text(encoding="utf-8"), adapter) == set()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import nonlocal_conformance.checks", {"nonlocal_conformance"}),
        ("from jax import numpy", {"jax"}),
        ("def f():\n    import scipy.ndimage as n", {"scipy"}),
        ("import importlib\nimportlib.import_module('tensorflow.math')", {"tensorflow"}),
        ("if 0:\n    __import__('nonlocal_jax')", {"nonlocal_jax"}),
        (
            "import torch.nn, math, nonlocal_core.spec\nfrom nonlocal_torch import op\nfrom . import op",
            set(),
        ),
    ],
)
def test_the_look_at_an_adapter_finds_a_foreign_import(source, found):
    assert forbidden_to_adapter(source, "nonlocal_torch") == found


@pytest.mark.parametrize("path", modules(CORE))
def test_the_core_names_no_framework(path):
    assert imported(path.read_text(encoding="utf-8")) & FOREIGN == set()


FLOORS = (
    {"errors"},
    {"arguments", "geometry"},
    {"planning"},
    {"spec"},
    {"reference", "costs"},
    {"files"},
    {"networks"},
    {"plots"},
    {"commands"},
)
"""The rooms of the core, each of which imports from the floors below it alone."""


def stands_on(source):
    """Return the rooms of the core from which a module imports."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    names = {f"{node.module}.{alias.name}" for node in nodes for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("nonlocal_core.")} & set().union(*FLOORS)


def above(source, room):
    """Return the rooms on its own floor or above it from which a module of a room imports."""
    floor = next(number for number, rooms in enumerate(FLOORS) if room in rooms)
    return stands_on(source) - set().union(*FLOORS[:floor]) - {room}


def test_every_room_of_the_core_has_its_floor():
    rooms = {path.stem for path in CORE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__"} == set().union(*FLOORS)


@pytest.mark.parametrize("path", modules(CORE))
def test_a_room_of_the_core_stands_on_those_below_it(path):
    room = path.relative_to(CORE).parts[0].removesuffix(".py")
    if room != "__init__":
        assert above(path.read_text(encoding="utf-8"), room) == set()


@pytest.mark.parametrize(
    ("room", "source", "found"),
    [
        ("reference", "from nonlocal_core.files.parameters import save_params", {"files"}),
        ("spec", "def f():\n    from nonlocal_core import reference", {"reference"}),
        ("geometry", "from nonlocal_core.arguments import Size", {"arguments"}),
        ("files", "from nonlocal_core.reference.block import pool\nfrom nonlocal_core import NonLocalSpec", set()),
    ],
)
def test_the_look_at_a_room_finds_an_import_from_above(room, source, found):
    assert above(source, room) == found


def circle(edges):
    """Return the modules that import each other in a loop: what is left when those that import none are taken away."""
    edges = {name: set(found) & edges.keys() for name, found in edges.items()}
    while free := {name for name, found in edges.items() if not found}:
        edges = {name: found - free for name, found in edges.items() if name not in free}
    return set(edges)


def imports_of_the_house():
    """Return from each module of the wheel the modules that it imports, and loads by an entry point."""
    roots = {"nonlocal_core": ROOT, "nonlocal_conformance": SUITE.parent, "nonlocal_bench": ROOT / "benchmarks"}
    roots |= dict.fromkeys(ADAPTERS, BACKENDS)
    paths = {
        ".".join(path.relative_to(root).with_suffix("").parts): path
        for name, root in roots.items()
        for path in (root / name).rglob("*.py")
        if path.name != "__init__.py"
    }
    edges = {}
    for name, path in paths.items():
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        found = {
            f"{node.module}.{alias.name}." for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names
        }
        edges[name] = {other for other in paths if any(one.startswith(f"{other}.") for one in found)}
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    for name, group in (("nonlocal_core.commands.program", "commands"), ("nonlocal_conformance.loader", "backends")):
        edges[name] |= {value.partition(":")[0] for value in groups[f"nonlocal_core.{group}"].values()}
    return edges


def test_no_modules_import_each_other_in_a_loop_entry_points_counted():
    edges = imports_of_the_house()
    assert "nonlocal_conformance.drivers.torch" in edges["nonlocal_conformance.loader"]
    assert "nonlocal_core.spec.block" in edges["nonlocal_core.spec.form"]
    assert circle(edges) == set()


def test_the_look_for_a_loop_finds_one():
    edges = imports_of_the_house()
    edges["nonlocal_core.geometry"] |= {"nonlocal_core.commands.program"}
    assert {"nonlocal_core.geometry", "nonlocal_core.commands.program"} <= circle(edges)


@pytest.mark.parametrize("path", modules(SUITE))
def test_the_suite_imports_an_adapter_only_in_its_driver(path):
    assert forbidden_to_suite(path.read_text(encoding="utf-8"), path.relative_to(SUITE)) == set()


@pytest.mark.parametrize(
    ("module", "found"),
    [
        ("drivers/torch.py", set()),
        ("networks/torch.py", set()),
        ("checks/torch.py", {"nonlocal_torch", "torch"}),
        ("drivers/jax.py", {"nonlocal_torch", "torch"}),
        ("drivers/__init__.py", {"nonlocal_torch", "torch"}),
        ("torch.py", {"nonlocal_torch", "torch"}),
    ],
)
def test_the_look_at_the_suite_finds_an_adapter_elsewhere(module, found):
    source = "import numpy, torch\nfrom nonlocal_torch import NonLocalBlock"
    assert forbidden_to_suite(source, module) == found


@pytest.mark.parametrize("package", ["nonlocal_core", "nonlocal_core.commands.program", "nonlocal_conformance"])
def test_importing_loads_no_framework(package):
    assert loaded(f"import {package}") == []


@pytest.mark.parametrize(
    ("statement", "found"), [("import nonlocal_torch", []), ("import nonlocal_torch, torch._dynamo", ["torch._dynamo"])]
)
def test_importing_the_pytorch_adapter_loads_no_compiler(statement, found):
    assert loaded(statement, names={"torch._dynamo"}) == found


def test_the_look_at_a_fresh_interpreter_finds_a_framework(tmp_path):
    (tmp_path / "leak.py").write_text("import tensorflow", encoding="utf-8")
    (tmp_path / "tensorflow.py").touch()
    assert loaded("import leak", path=[tmp_path]) == ["tensorflow"]


def main():
    """Print which rooms each room of the wheel imports from."""
    rooms = {}
    for name, found in imports_of_the_house().items():
        mine, *others = (".".join(module.split(".")[:2]) for module in (name, *sorted(found)))
        rooms.setdefault(mine, set()).update(other for other in others if other != mine)
    sys.stdout.writelines(f"{room}: {', '.join(sorted(others)) or '-'}\n" for room, others in sorted(rooms.items()))


if __name__ == "__main__":
    main()
