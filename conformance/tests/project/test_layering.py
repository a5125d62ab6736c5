"""Who may import whom: the core no framework, an adapter its own, the suite an adapter in its driver."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
BACKENDS = ROOT / "backends"
SUITE = ROOT / "conformance" / "nonlocal_conformance"

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
    allowed = {own, *FRAMEWORKS.get(own, ())} if Path(module).parent == Path("drivers") else set()
    return imported(source) & FOREIGN - allowed


def loaded(statement, path=()):
    """Return which frameworks and adapters a fresh interpreter has loaded after `statement`."""
    code = f"import sys; {statement}; print(*sorted({FOREIGN!r} & sys.modules.keys()))"
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


@pytest.mark.parametrize("path", modules(ROOT / "nonlocal_core"))
def test_the_core_names_no_framework(path):
    assert imported(path.read_text(encoding="utf-8")) & FOREIGN == set()


@pytest.mark.parametrize("path", modules(SUITE))
def test_the_suite_imports_an_adapter_only_in_its_driver(path):
    assert forbidden_to_suite(path.read_text(encoding="utf-8"), path.relative_to(SUITE)) == set()


@pytest.mark.parametrize(
    ("module", "found"),
    [
        ("drivers/torch.py", set()),
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


def test_the_look_at_a_fresh_interpreter_finds_a_framework(tmp_path):
    (tmp_path / "leak.py").write_text("import tensorflow", encoding="utf-8")
    (tmp_path / "tensorflow.py").touch()
    assert loaded("import leak", path=[tmp_path]) == ["tensorflow"]
