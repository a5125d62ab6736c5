"""A third party installs the wheel and runs the suite on an implementation of its own, by all three ways."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TOY = Path(__file__).parent / "toy"
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
def commands(tmp_path_factory):
    """Install this wheel, the toy's and pytest in a new environment; return the folder of its commands."""
    folder = tmp_path_factory.mktemp("third party")
    shutil.copytree(TOY, folder / "toy", ignore=shutil.ignore_patterns("__pycache__", "dist"))
    for project in (ROOT, folder / "toy"):
        succeed(*UV, "build", "--offline", "--no-build-isolation", "--wheel", "--out-dir", folder, project, cwd=folder)
    succeed(*UV, "venv", "--python", sys.executable, folder / "venv", cwd=folder)
    found = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    wheels = sorted(folder.glob("*.whl"))
    assert len(wheels) == 2
    options = ["--python", found / "python", "-c", ROOT / "constraints.txt"]
    succeed(*UV, "pip", "install", *options, *wheels, "pytest", cwd=folder)
    return found


def counted(output):
    """Return the numbers of the closing line of pytest."""
    return {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped)", output.splitlines()[-1])}


def test_the_checks_run_without_pytest(commands, tmp_path):
    code = (
        "import sys; from nonlocal_conformance import run_checks; from toy_nonlocal.driver import ToyDriver; "
        "print(*sorted({result.outcome for result in run_checks(ToyDriver())}), 'pytest' in sys.modules)"
    )
    assert succeed(commands / "python", "-c", code, cwd=tmp_path) == "passed unsupported False\n"


def test_the_checks_run_among_ones_own_tests(commands, tmp_path):
    shutil.copy(TOY / "test_toy_nonlocal.py", tmp_path)
    numbers = counted(succeed(commands / "python", "-m", "pytest", "-q", cwd=tmp_path))
    assert numbers.keys() == {"passed", "skipped"}
    assert numbers["passed"] >= 10


@pytest.mark.parametrize("name", ["toy", "toy_nonlocal.driver:ToyDriver"])
def test_the_checks_run_by_the_command(commands, tmp_path, name):
    output = succeed(commands / "nonlocal", "conformance", name, cwd=tmp_path)
    assert "backend toy 1.2.3 on cpu" in output
    assert counted(output).keys() == {"passed", "skipped"}


def test_a_backend_that_is_not_there_is_an_error_that_lists_the_third_partys(commands, tmp_path):
    done = run(commands / "nonlocal", "conformance", "tyo", cwd=tmp_path)
    assert done.returncode == 2
    assert "'toy'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_third_partys_driver_may_refuse_a_device(commands, tmp_path):
    done = run(commands / "nonlocal", "conformance", "toy", "--device", "cuda", cwd=tmp_path)
    assert done.returncode == 2
    assert "`device` must be 'cpu' for the backend 'toy'" in done.stderr


def test_a_fault_of_a_third_party_is_found_by_all_three_ways(commands, tmp_path):
    (tmp_path / "faulty_toy.py").write_text(
        "from toy_nonlocal.driver import ToyDriver\n"
        "class Driver(ToyDriver):\n"
        "    def block(self, *args, **options):\n"
        "        z, statistics = super().block(*args, **options)\n"
        "        return 2 * z, statistics\n"
    )
    own = (TOY / "test_toy_nonlocal.py").read_text()
    own = own.replace("toy_nonlocal.driver import ToyDriver", "faulty_toy import Driver as ToyDriver")
    (tmp_path / "test_faulty_toy.py").write_text(own)
    by_hand = run(
        commands / "python",
        "-c",
        "from nonlocal_conformance import run_checks; from faulty_toy import Driver; run_checks(Driver())",
        cwd=tmp_path,
    )
    among_tests = run(commands / "python", "-m", "pytest", "-q", cwd=tmp_path)
    code = "import sys; from nonlocal_core.commands.program import main; sys.exit(main())"
    by_command = run(commands / "python", "-c", code, "conformance", "faulty_toy:Driver", cwd=tmp_path)
    for done in (by_hand, among_tests, by_command):
        assert done.returncode == 1
        assert "forward-embedded_gaussian_2d-float64" in done.stdout + done.stderr
