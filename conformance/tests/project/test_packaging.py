"""The wheel: what is in it, and what it does where there is no framework."""

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

import nonlocal_core

ROOT = Path(__file__).parents[3]
ADAPTERS = ["backends/nonlocal_jax", "backends/nonlocal_tensorflow", "backends/nonlocal_torch"]
PACKAGES = ["nonlocal_core", *ADAPTERS, "benchmarks/nonlocal_bench", "conformance/nonlocal_conformance"]
INFO = f"nonlocal_core-{nonlocal_core.__version__}.dist-info"
UV = [sys.executable, "-m", "uv"]


def run(*command, cwd):
    """Run a command away from the checkout; return what it did, as text."""
    apart = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    return subprocess.run(list(map(str, command)), cwd=cwd, env=apart, capture_output=True, text=True, check=False)


def succeed(*command, cwd):
    """Run a command that must succeed; return what it printed."""
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build the source archive, and the wheel from that archive, with what is installed."""
    folder = tmp_path_factory.mktemp("dist")
    succeed(*UV, "build", "--offline", "--no-build-isolation", "--out-dir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    return path


def environment(folder, requirement):
    """Install a requirement alone in a new environment; return the folder of its commands."""
    succeed(*UV, "venv", "--python", sys.executable, folder / "venv", cwd=folder)
    commands = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    options = ["--python", commands / "python", "-c", ROOT / "constraints.txt"]
    succeed(*UV, "pip", "install", *options, requirement, cwd=folder)
    return commands


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory):
    return environment(tmp_path_factory.mktemp("bare"), wheel)


@pytest.fixture(scope="module")
def with_demo(wheel, tmp_path_factory):
    return environment(tmp_path_factory.mktemp("demo"), f"nonlocal-core[demo] @ {wheel.as_uri()}")


def sources(package):
    """Return the names under which the files of a package belong in the wheel."""
    folder = ROOT / package
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder.parent).as_posix() for path in files}


def test_the_wheel_holds_the_packages_and_nothing_else(wheel):
    about = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
    expected = set().union(*map(sources, PACKAGES), (f"{INFO}/{name}" for name in about))
    assert set(zipfile.ZipFile(wheel).namelist()) == expected


def test_the_source_archive_holds_what_a_test_run_needs(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 2)[1] for name in archive.getnames()}
    folders = {"backends", "benchmarks", "conformance", "docs", "examples", "nonlocal_core"}
    files = {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "RELEASING.md"}
    files |= {"SECURITY.md", "constraints.txt"}
    assert names == folders | files | {".gitignore", "PKG-INFO", "pyproject.toml"}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_of_the_wheel_says_that_it_is_typed(wheel, package):
    assert f"{Path(package).name}/py.typed" in zipfile.ZipFile(wheel).namelist()


def test_the_wheel_requires_what_the_project_file_says(wheel):
    header = HeaderParser().parsestr(zipfile.ZipFile(wheel).read(f"{INFO}/METADATA").decode())
    required = [line for line in header.get_all("Requires-Dist") if "extra ==" not in line]
    assert {line.partition(">=")[0] for line in required} == {"array-api-compat", "numpy", "safetensors"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(header.get_all("Provides-Extra")) == set(project["optional-dependencies"])


def test_the_environment_has_no_framework(bare):
    listed = succeed(*UV, "pip", "list", "--python", bare / "python", "--format", "freeze", cwd=bare)
    names = {line.partition("==")[0] for line in listed.splitlines()}
    assert names == {"array-api-compat", "nonlocal-core", "numpy", "safetensors"}


def test_the_core_computes_in_a_bare_environment(bare):
    code = (
        "import numpy as np, nonlocal_core as nlc; "
        "spec = nlc.NonLocalSpec(channels=4, subsample=2); "
        "params = nlc.init_params(spec, np.random.default_rng(0)); "
        "print(nlc.nonlocal_block(np.ones((1, 4, 6, 4)), params, spec).sum())"
    )
    assert succeed(bare / "python", "-c", code, cwd=bare) == "96.0\n"


def test_the_program_says_its_version_in_a_bare_environment(bare):
    assert succeed(bare / "nonlocal", "--version", cwd=bare).split()[-1] == nonlocal_core.__version__


def test_the_demo_says_what_to_install_in_a_bare_environment(bare):
    done = run(bare / "nonlocal", "demo", cwd=bare)
    assert done.returncode == 2
    assert "nonlocal-core[demo]" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("adapter", "framework", "extra"), [("nonlocal_torch", "PyTorch", "torch")])
def test_an_adapter_without_its_framework_says_what_to_install(bare, adapter, framework, extra):
    done = run(bare / "python", "-c", f"import {adapter}", cwd=bare)
    message = done.stderr.splitlines()[-1]
    assert message.startswith(f"ImportError: {adapter} needs {framework}.")
    assert f"pip install 'nonlocal-core[{extra}]'" in message


def test_the_demo_runs_on_the_reference_without_a_framework(with_demo, tmp_path):
    output = succeed(with_demo / "nonlocal", "demo", "--size", "24", "--output", "picture.png", cwd=tmp_path)
    assert "numpy" in output
    assert "nonlocal-core[torch]" in output
    assert (tmp_path / "picture.png").stat().st_size > 0


def test_an_installation_offers_no_folder_of_the_checkout(tmp_path):
    names = ("backends", "conformance")
    look = f"from importlib.util import find_spec; print(*filter(find_spec, {names}))"
    assert succeed(sys.executable, "-c", look, cwd=tmp_path) == "\n"
    assert succeed(sys.executable, "-c", look, cwd=ROOT) == "backends conformance\n"
