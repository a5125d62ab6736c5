"""What is declared, pinned, run each night and written in the README is one list of versions."""

import re
import tomllib
from pathlib import Path

import pytest

import nonlocal_core

ROOT = Path(__file__).parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
DECLARED = [*PROJECT["dependencies"], *(line for name in ("torch", "tensorflow", "jax") for line in EXTRAS[name])]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = {row[0]: row[1:] for row in re.findall(r"^\| (\S+) \| ([\d.]+) \| ([\d.]+) \|$", README, re.MULTILINE)}


def test_the_readme_names_every_package_that_is_declared():
    assert ROWS.keys() == {"Python", *(line.partition(">=")[0] for line in DECLARED)}


@pytest.mark.parametrize("line", DECLARED)
def test_the_readme_has_the_oldest_version_that_is_declared_and_the_newest_that_is_pinned(line):
    name, _, oldest = line.partition(">=")
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    (newest,) = re.findall(rf"^{name}==(.+)$", pins, re.MULTILINE)
    assert ROWS[name] == (oldest, newest)


@pytest.mark.parametrize(
    "extra", [name for name, lines in EXTRAS.items() if any(line.startswith("torch") for line in lines)]
)
def test_every_extra_declares_the_same_pytorch(extra):
    assert "torch>=2.9" in EXTRAS[extra]


def test_the_workflow_runs_each_python_that_the_readme_names():
    oldest, newest = (int(version.partition(".")[2]) for version in ROWS["Python"])
    workflow = (ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8")
    assert PROJECT["requires-python"] == f">=3.{oldest}"
    assert set(re.findall(r'"(3\.\d+)"', workflow)) == {f"3.{minor}" for minor in range(oldest, newest + 1)}


@pytest.mark.parametrize("target", ["test", "test-oldest", "test-torch", "test-elsewhere-sse", "test-elsewhere-avx2"])
def test_the_workflow_runs_each_target_of_the_makefile(target):
    workflow = (ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8")
    assert re.search(rf"run: make {target}[ }}]", workflow)


def test_what_is_cited_is_this_version():
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.+)$", cited, re.MULTILINE)[1] == nonlocal_core.__version__
