"""The program `nonlocal` and the backends that it finds."""

import contextlib
import os
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import nonlocal_core
from nonlocal_conformance import loader
from nonlocal_core.commands import program, usage

ROOT = Path(__file__).parents[3]
EXTRAS = {"PIL", "matplotlib", "rich", "skimage"}


def light(statement):
    """Return which packages of the extra "demo" a fresh interpreter has loaded after `statement`."""
    code = f"import sys\n{statement}\nprint(*sorted({EXTRAS!r} & sys.modules.keys()), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stderr.split()


def command(body):
    """Return a command `act` that runs `body`."""

    def add_parser(subparsers):
        subparsers.add_parser("act").set_defaults(run=body)

    return add_parser


@pytest.fixture
def commands(monkeypatch):
    """Set what the commands are, as a mapping from names to `add_parser` or an address."""

    def put(**entries):
        values = {name: entry if isinstance(entry, str) else f"{name}:add" for name, entry in entries.items()}
        for name, entry in entries.items():
            if not isinstance(entry, str):
                monkeypatch.setitem(sys.modules, name, type("Module", (), {"add": staticmethod(entry)}))
        found = [EntryPoint(name, value, program.GROUP) for name, value in values.items()]
        monkeypatch.setattr(program, "entry_points", lambda group: found if group == program.GROUP else [])

    return put


def interrupt(_args):
    raise KeyboardInterrupt


def complain(_args):
    message = "argument --tea: must be hot"
    raise usage.UsageError(message)


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit, match="0"):
        program.main(["--version"])
    assert capsys.readouterr().out == f"nonlocal {nonlocal_core.__version__}\n"


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit, match="0"):
        program.main(["--help"])
    assert {"demo", "conformance"} <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "statement", ["from nonlocal_core.commands import program", "from nonlocal_conformance import demo"]
)
def test_the_program_starts_without_its_extras(statement):
    assert light(statement) == []


def test_finding_the_commands_loads_no_extras():
    start = "from nonlocal_core.commands.program import main\ntry: main(['--version'])\nexcept SystemExit: pass"
    assert light(start) == []


def test_the_probe_for_extras_sees_them():
    assert light("import PIL, rich.console") == ["PIL", "rich"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "required: COMMAND"),
        (["dem"], "invalid choice: 'dem'"),
        (["demo", "--siz", "9"], "unrecognized arguments: --siz"),
        (["demo", "--size"], "argument --size: expected one argument"),
        (["conformance", "numpy", "-k", "a b"], "-k a b; what this command passes on follows --: nonlocal conformance"),
        (["conformance", "numpy", "-k", "a b"], "nonlocal conformance numpy -- -k 'a b' (`nonlocal"),
        (["conformance", "-x", "numpy", "--", "-v"], "nonlocal conformance numpy -- -x -v (`nonlocal"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(argv, words, capsys):
    assert program.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert words in err


def test_the_status_is_that_of_the_command(commands):
    commands(act=command(lambda _args: 7))
    assert program.main(["act"]) == 7


def test_an_interrupted_command_says_so(commands, capsys):
    commands(act=command(interrupt))
    assert program.main(["act"]) == 130
    assert capsys.readouterr().err == "nonlocal: interrupted\n"


def test_an_error_of_the_user_is_one_line_and_status_2(commands, capsys):
    commands(act=command(complain))
    assert program.main(["act"]) == 2
    assert capsys.readouterr().err == "nonlocal: error: argument --tea: must be hot\n"


@pytest.mark.parametrize("address", ["no_such_package:add", "nonlocal_core.commands.program:no_such_function"])
def test_a_command_that_cannot_be_loaded_spoils_no_other(address, commands, capsys):
    commands(act=command(lambda _args: 0), lost=address)
    assert program.main(["act"]) == 0
    assert program.main(["lost"]) == 2
    assert "the command 'lost' cannot be loaded" in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(usage.UsageError, match=r"needs 'rich': pip install \"nonlocal-core\[demo\]\""):
        usage.need("demo", "json", "rich")


COMMANDS = {
    "help": ["--help"],
    "demo help": ["demo", "--help"],
    "conformance help": ["conformance", "--help"],
    "cost help": ["cost", "--help"],
    "bench help": ["bench", "--help"],
    "cost": ["cost", "--shape", "1x128x128x64", "--pairwise", "dot_product", "--training"],
    "demo": ["demo", "--size", "16", "--backend", "numpy"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_is_cut_off_in_a_narrow_terminal(name, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(SystemExit):
        program.main(COMMANDS[name])
    out = capsys.readouterr().out
    assert "…" not in out
    if name.endswith("help"):
        assert max(map(len, out.splitlines())) <= 40
        assert not re.search(r"Dr$|^ *iver", out, re.MULTILINE)
    else:
        assert re.search(r"^(Method: reassociated|Backend: numpy)$", out, re.MULTILINE)


def test_the_table_of_the_benchmarks_fits_a_narrow_terminal(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert (
        program.main(["bench", "--results", str(ROOT / "benchmarks/results"), "--output", str(tmp_path / "a.png")]) == 0
    )
    out = capsys.readouterr().out
    assert "…" not in out
    assert "\nform: concatenation\n" in out


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [["--help"], ["conformance", "--help"], COMMANDS["cost"]])
def test_a_full_disk_under_the_output_is_one_line_and_status_74(words, unbuffered):
    code = "import sys; from nonlocal_core.commands.program import main; sys.exit(main(sys.argv[1:]))"
    with Path("/dev/full").open("w") as full:
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(
            [sys.executable, "-c", code, *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            check=False,
        )
    assert done.stderr == "nonlocal: error: the output cannot be written: No space left on device.\n"
    assert done.returncode == 74


def test_a_reader_that_has_left_is_no_error():
    code = "import sys; from nonlocal_core.commands.program import main; sys.exit(main(['--help']))"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_another_error_of_the_system_is_raised(commands):
    def lose(_args):
        raise FileNotFoundError(2, "No such file or directory")

    commands(act=command(lose))
    with pytest.raises(FileNotFoundError, match="No such file"):
        program.main(["act"])


# Backends


@pytest.fixture
def entries(monkeypatch):
    """Set what the installed backends are, as pairs of a name and an address."""

    def put(*pairs):
        found = [EntryPoint(name, value, loader.GROUP) for name, value in pairs]
        monkeypatch.setattr(
            loader,
            "entry_points",
            lambda **given: [entry for entry in found if given.get("name", entry.name) == entry.name],
        )

    return put


@pytest.fixture
def no_torch(monkeypatch):
    """Hide PyTorch from imports that are yet to come, and undo those that were."""
    for name in [name for name in sys.modules if name.endswith("drivers.torch")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)


@pytest.mark.parametrize("name", ["numpy", "nonlocal_conformance.drivers.numpy:NumpyDriver"])
def test_a_backend_is_loaded_by_its_name_or_its_address(name):
    driver = loader.load(name)
    assert (driver.name, driver.device) == ("numpy", "cpu")


def test_every_backend_is_available_where_its_framework_is_installed():
    drivers, missing = loader.available()
    assert {"numpy", "torch"} <= {driver.name for driver in drivers}
    assert not {"numpy", "torch"} & missing.keys()


@pytest.mark.usefixtures("no_torch")
def test_a_backend_whose_framework_is_missing_says_what_to_install():
    with pytest.raises(ImportError, match=r'torch.*`pip install "nonlocal-core\[torch\]"`'):
        loader.load("torch")


@pytest.mark.usefixtures("no_torch")
def test_a_missing_framework_is_listed_when_nobody_named_it():
    drivers, missing = loader.available()
    assert "numpy" in [driver.name for driver in drivers]
    assert 'pip install "nonlocal-core[torch]"' in missing["torch"]


def test_a_missing_device_is_listed_when_nobody_named_the_backend():
    drivers, missing = loader.available("abacus")
    assert drivers == []
    assert "`device` must be 'cpu'" in missing["numpy"]
    assert "`device` must be" in missing["torch"]


def test_a_missing_device_of_a_named_backend_is_refused():
    with pytest.raises(ValueError, match=r"`device` must be .*Got 'abacus'"):
        loader.load("torch", "abacus")


@pytest.mark.parametrize("name", ["tourch", "", "a:b:c", ":Driver", "package.module:", ".here:Driver", "a b:C"])
def test_an_unknown_backend_is_refused_with_the_list_of_the_known(name):
    with pytest.raises(ValueError, match=r"`backend` must be one of \[.*'numpy'.*\] or package.module:Driver"):
        loader.load(name)


def test_a_module_that_does_not_exist_is_refused():
    with pytest.raises(ImportError, match="'no_such_package:Driver' cannot be imported: No module named"):
        loader.load("no_such_package:Driver")


def test_a_class_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"`backend` must name a driver class that exists\. Got 'json:Driver'"):
        loader.load("json:Driver")


@pytest.mark.parametrize("address", ["os:system", "subprocess:Popen", "json:JSONDecoder", "os:sep"])
def test_what_is_no_driver_class_is_refused_and_not_called(address):
    words = f"`backend` must be a driver class, which has a method `block`. Got '{address}'."
    with pytest.raises(ValueError, match=f"^{words}$"):
        loader.load(address)


def test_two_backends_of_one_name_are_refused(entries):
    entries(("toy", "json:Ours"), ("toy", "json:Theirs"))
    with pytest.raises(ValueError, match=r"one of \['json:Ours', 'json:Theirs'\], which share a name"):
        loader.load("toy")


def test_a_backend_that_is_seen_twice_is_one_backend(entries):
    address = "nonlocal_conformance.drivers.numpy:NumpyDriver"
    entries(("toy", address), ("toy", address))
    assert [driver.name for driver in loader.available()[0]] == ["numpy"]


@pytest.mark.parametrize(
    "words", [["numpy", "--device", "cpu"], ["--device", "cpu", "numpy"]], ids=["backend first", "option first"]
)
def test_what_follows_two_dashes_goes_to_pytest_wherever_the_options_stand(words):
    started = [
        sys.executable,
        "-c",
        "import sys; from nonlocal_core.commands.program import main; sys.exit(main())",
        "conformance",
    ]
    passed_on = ["--collect-only", "-q", "-k", "determinism"]
    done = subprocess.run([*started, *words, "--", *passed_on], capture_output=True, text=True, check=True)
    assert "numpy-determinism-" in done.stdout
    assert "numpy-gradients-" not in done.stdout


def test_two_dashes_are_refused_by_a_command_that_passes_nothing_on(capsys):
    assert program.main(["cost", "--shape", "1x5x4", "--", "-q"]) == 2
    assert "this command takes nothing after --" in capsys.readouterr().err
