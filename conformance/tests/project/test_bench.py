"""The benchmarks: what they measure, what they keep, what they refuse; and `nonlocal bench`, which shows it."""

import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nonlocal_bench.results import load
from nonlocal_core import attention, nonlocal_block, nonlocal_block_vjp
from nonlocal_core.commands.program import main

ROOT = Path(__file__).parents[3]
sys.path.append(str(ROOT / "benchmarks"))  # a folder of programs, no package

import in_turn  # noqa: E402
import page  # noqa: E402
import plans  # noqa: E402
import run as program  # noqa: E402
from compact import compact, narrowed, whole  # noqa: E402
from measuring.arrays import input_of, params_of, positions_of  # noqa: E402
from measuring.case import Case  # noqa: E402
from measuring.subject import Subject  # noqa: E402

NAN = float("nan")
FRAMEWORKS = ["torch", "tensorflow", "tensorflow_xla", "jax"]
FORMS = ["gaussian", "embedded_gaussian", "dot_product", "concatenation"]
CURVE = ("cpu", "dot_product", "forward", 1024)
LARGE = ("torch_matrix", "cpu", "dot_product", "training", 262144)

MEASURE = """
import sys; sys.path.insert(0, "benchmarks")
from record import CONFIG, commit, measured
sys.exit(measured({plan!r}, CONFIG, commit("HEAD"), limit={limit}))
"""


# The suite


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """Return a repository of its own with the benchmarks, all committed, and its environment."""
    folder = tmp_path_factory.mktemp("checkout")
    ignored = shutil.ignore_patterns("results", "html", "__pycache__")
    shutil.copytree(ROOT / "benchmarks", folder / "benchmarks", ignore=ignored)
    shutil.copy(ROOT / ".gitignore", folder)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for command in (
        ["init", "--quiet", "--initial-branch=first"],
        ["add", "."],
        ["commit", "--quiet", "--message", "all"],
    ):
        subprocess.run([*git, *command], cwd=folder, check=True)
    return folder


def python(folder, *arguments):
    """Run Python in a checkout, with a home of its own, for asv keeps a file there."""
    environment = {**os.environ, "HOME": str(folder / ".venv"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def measured(checkout):
    """Return the checkout after three cases of a curve: two that can be measured, one that is too large."""
    plan = {"scaling.Scaling": [("torch", *CURVE), LARGE], "imports.Import": [("nonlocal_core",)]}
    done = python(checkout, "-c", MEASURE.format(plan=plan, limit=120))
    assert done.returncode == 0, done.stdout + done.stderr
    return checkout, done.stdout


def test_the_suite_passes_the_check_of_asv(checkout):
    # asv 0.6.5 looks for a relative path in the folder of the path.
    done = python(checkout, "-m", "asv", "--config", str(checkout / "benchmarks" / "asv.conf.json"), "check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No problems found" in done.stdout


def test_the_suite_is_found_without_an_import_of_a_framework(checkout):
    code = (
        "import sys; sys.path.insert(0, 'benchmarks'); import plans, suite.forward, suite.quality, suite.rows; "
        "print({'jax', 'keras', 'tensorflow', 'torch'} & sys.modules.keys())"
    )
    assert python(checkout, "-c", code).stdout == "set()\n"


@pytest.mark.parametrize(
    ("name", "plan"), [(name, plan) for plan, make in plans.PLANS.items() for name in make()], ids="-".join
)
def test_a_plan_has_only_combinations_that_the_benchmarks_have(name, plan):
    module, _, own = name.partition(".")
    axes = getattr(__import__(f"suite.{module}", fromlist=[own]), own).params
    combinations = set(itertools.product(*axes)) if isinstance(axes[0], tuple) else {(one,) for one in axes}
    assert set(plans.PLANS[plan]()[name]) <= combinations


def test_a_benchmark_that_ran_has_a_time_and_a_memory(measured):
    found = load(measured[0] / "benchmarks" / "results")
    (time,) = [one.value for one in found.of("scaling.Scaling.time_positions") if one.params["positions"] == 1024]
    (memory,) = [one.value for one in found.of("scaling.Scaling.track_memory") if one.params["positions"] == 1024]
    assert 1e-5 < time < 10
    assert 0 <= memory < 2**30
    assert found.of("imports.Import.timeraw_import")[0].value > 0


def test_a_benchmark_that_does_not_fit_into_memory_says_so(measured):
    found = load(measured[0] / "benchmarks" / "results")
    (large,) = [one for one in found.of("scaling.Scaling.time_positions") if one.params["positions"] == 262144]
    assert large.value is None
    assert large.note.startswith("out of memory: needs 1,024 GiB")
    assert "out of memory: needs 1,024 GiB" in measured[1]


def test_results_hold_only_what_was_tried(measured):
    (file,) = (measured[0] / "benchmarks" / "results").glob("*/*-python3.*.json")
    results = json.loads(file.read_text(encoding="utf-8"))["results"]
    assert results["imports.Import.timeraw_import"][1] == [["'nonlocal_core'"]]
    assert results["scaling.Scaling.time_positions"][1][4] == ["1024", "262144"]
    assert file.stat().st_size < 5000


@pytest.mark.parametrize("values", [[1.0, NAN, None, NAN, NAN, NAN], [NAN, NAN, NAN, NAN, NAN, 2.0]])
def test_results_that_are_made_small_can_be_made_whole_again(values):
    axes = [["a", "b", "c"], ["1", "2"]]
    columns = [values, axes, "version", 7, None, [value if value in {1.0, 2.0} else None for value in values]]
    small = compact(columns)
    assert len(small[0]) == len(small[5]) == len(small[1][0]) * len(small[1][1]) < 6
    np.testing.assert_equal(whole(small, axes), columns)


def test_the_pages_have_only_benchmarks_and_parameters_of_which_there_are_results():
    about = {"one": {"params": [["a", "b", "c"], ["1", "2"]], "unit": "s"}, "two": {"params": [["a"]]}, "version": 2}
    found = [{"one": [[1.0], [["c"], ["2"]]]}, {"one": [[1.0], [["a"], ["2"]]], "gone": [[1.0], []]}]
    expected = {"one": {"params": [["a", "c"], ["2"]], "unit": "s"}, "version": 2}
    assert narrowed(about, found) == expected


def test_results_that_all_failed_are_kept():
    assert compact([None, [["a", "b"]], "version"]) == [[None, None], [["a", "b"]], "version"]


def test_progress_is_one_line_for_each_measurement(measured):
    lines = [line for line in measured[1].splitlines() if "/5 " in line]
    assert [line.split("/")[0].strip() for line in lines] == ["1", "2", "3", "4", "5"]


def test_results_bear_the_commit_and_the_versions_and_no_path(measured):
    folder = measured[0] / "benchmarks" / "results"
    found = load(folder)
    assert found.commit == (measured[0] / ".git/refs/heads/first").read_text(encoding="utf-8").strip()
    assert [path.name[:8] for path in folder.glob("*/*-python3.*.json")] == [found.commit[:8]]
    assert found.versions["numpy"] == np.__version__
    text = "".join(path.read_text(encoding="utf-8") for path in folder.rglob("*.json"))
    assert not [word for word in (str(Path.home()), str(measured[0]), sys.prefix, os.uname().nodename) if word in text]


def test_a_benchmark_that_takes_too_long_is_ended_and_says_so(checkout):
    done = python(checkout, "-c", MEASURE.format(plan={"scaling.Scaling": [("torch", *CURVE)]}, limit=0))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("out of time: more than 0 s") == 2


def test_a_changed_tree_is_not_measured(checkout):
    change = checkout / "benchmarks" / "changed.py"
    change.touch()
    done = python(checkout, "benchmarks/run.py", "quick")
    change.unlink()
    assert done.returncode == 2
    assert done.stderr == (
        "benchmarks: error: the working tree must be committed, because results bear the name of its commit. "
        "Got 1 changed, such as benchmarks/changed.py.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quick", "Sideways"], "`names` must be some of Import, Forward, "),
        (["compare"], "`BASE` must be a commit, as in make bench-compare BASE=HEAD~1. Got none."),
        (["compare", "no_such_commit"], "fatal: Needed a single revision"),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line(checkout, arguments, words):
    done = python(checkout, "benchmarks/run.py", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"benchmarks: error: {words}")
    assert done.stderr.count("\n") == 1


def test_there_are_no_pages_without_results(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "HERE", tmp_path)
    with pytest.raises(RuntimeError, match=r"must be results, which `make bench` writes\. Got none"):
        program.publish()


def test_the_interpreter_for_another_commit_finds_that_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "WORK", tmp_path)
    (tmp_path / "nonlocal_core").mkdir()
    (tmp_path / "nonlocal_core" / "__init__.py").touch()
    code = "import nonlocal_core, numpy; print(nonlocal_core.__file__)"
    done = subprocess.run([program.interpreter(tmp_path), "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "nonlocal_core" / "__init__.py")


# What is measured


def test_a_load_beside_computes_while_calls_are_measured_and_ends_with_them():
    with in_turn.load_beside(2) as processes:
        assert [process.poll() for process in processes] == [None, None]
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (("torch", "cpu", "dot_product", "sorted", 4, (3, 4)), "sorted does not compute the form dot_product"),
        (("mmcv", "cpu", "concatenation", "auto", 4, (3, 4), "float32", True), "writes over what its gradient"),
        (("timm", "cpu", "dot_product", "auto", 4, (3, 4)), "timm lacks the form dot_product"),
        (("timm", "cpu", "embedded_gaussian", "streamed", 4, (3, 4)), "timm knows the matrix alone"),
        (("jax_matrix", "cpu", "dot_product", "reassociated", 4, (3, 4)), "jax_matrix knows the matrix alone"),
    ],
)
def test_what_cannot_be_measured_has_a_reason(case, words, monkeypatch):
    monkeypatch.setattr("measuring.case.find_spec", lambda name: name)
    assert words in Case(*case).impossible


def test_what_is_not_installed_is_not_measured(monkeypatch):
    monkeypatch.setattr("measuring.case.find_spec", lambda _: None)
    assert Case("jax", "cpu", "gaussian", "auto", 4, (3, 4)).impossible == "jax is not installed"


@pytest.mark.parametrize(
    ("backend", "spatial", "shape"),
    [
        ("torch", (7,), (1, 7, 4)),
        ("mmcv", (2, 3, 5), (1, 2, 3, 5, 4)),
        ("slowfast", (7,), (1, 1, 1, 7, 4)),
        ("pytorchvideo", (3, 5), (1, 1, 3, 5, 4)),
        ("timm", (2, 3, 5), (1, 6, 5, 4)),
        ("timm", (7,), (1, 1, 7, 4)),
    ],
)
def test_an_implementation_gets_as_many_axes_as_it_takes(backend, spatial, shape):
    assert Case(backend, "cpu", "embedded_gaussian", "auto", 4, spatial).shape == shape


def data(backend, form, *, training=False):
    """Return a small case with its arrays in float64."""
    case = Case(backend, "cpu", form, "auto", 6, (3, 5), training=training)
    params = {name: array.astype(np.float64) for name, array in params_of(case.spec).items()}
    return case, params, *(input_of(case.shape, seed).astype(np.float64) for seed in (0, 2))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", FRAMEWORKS)
def test_the_call_that_is_measured_gives_the_output(backend, form):
    case, params, x, _ = data(backend, form)
    one = Subject("", (), case, "forward")
    expected = nonlocal_block(x, params, case.spec)
    np.testing.assert_allclose(one.library.to_numpy(one.run()), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", FRAMEWORKS)
def test_the_step_that_is_measured_gives_the_gradients(backend, form):
    case, params, x, dz = data(backend, form, training=True)
    one = Subject("", (), case, "training")
    result = one.run()
    dx = {"torch": lambda: one.library.to_numpy(result[0]), "jax": lambda: result[0][1]}.get(backend, lambda: result[0])
    expected, dparams = nonlocal_block_vjp(x, params, case.spec, dz, training=True)
    np.testing.assert_allclose(dx(), expected, atol=1e-4 * np.abs(expected).max())
    counts = {"torch": lambda: result[1:], "jax": lambda: one.library.jax.tree.leaves(result[0][0])}
    assert len(counts.get(backend, lambda: result[1])()) == len(dparams)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", FRAMEWORKS)
def test_the_rows_that_are_measured_are_those_of_the_weights(backend, form):
    case, params, x, _ = data(backend, form)
    expected = attention(x, params, case.spec, positions_of(15))
    np.testing.assert_allclose(np.asarray(Subject("", (), case, "rows").run()), expected, atol=1e-6)


def test_an_error_of_memory_gets_a_note(tmp_path, monkeypatch):
    monkeypatch.setenv("NONLOCAL_BENCH_JOURNAL", str(tmp_path / "journal"))
    one = Subject("forward.Forward", ("mmcv", 7), Case(*LARGE[:3], "auto", 4, (3, 4)), "forward")

    def call():
        message = "DefaultCPUAllocator: can't allocate memory"
        raise RuntimeError(message)

    one.call = call
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        one.run()
    note = {"benchmark": "forward.Forward", "params": ["'mmcv'", "7"], "note": "out of memory"}
    assert json.loads((tmp_path / "journal").read_text(encoding="utf-8")) == note


# The pages


LINKS = """<script src="https://a.b/jquery-3.3.1.min.js" integrity="x" crossorigin="y"></script>
<link rel="stylesheet" href="https://a.b/c@1/bootstrap.min.css" integrity="x" crossorigin="anonymous">
<a href="https://a.b/">a link</a>"""


@pytest.fixture
def archives(monkeypatch):
    """Replace what npm fetches."""

    def archive(package, _):
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as files:
            for name in {member for owner, member in page.FILES.values() if owner == package}:
                member = tarfile.TarInfo(f"package/{name}")
                member.size = len(name)
                files.addfile(member, io.BytesIO(name.encode()))
        return content.getvalue()

    monkeypatch.setattr(page, "archive", archive)


@pytest.mark.usefixtures("archives")
def test_the_pages_get_their_scripts_from_beside_them(tmp_path):
    (tmp_path / "index.html").write_text(LINKS, encoding="utf-8")
    page.make_local(tmp_path)
    assert (tmp_path / "index.html").read_text(encoding="utf-8") == (
        '<script src="vendor/jquery-3.3.1.min.js"></script>\n'
        '<link rel="stylesheet" href="vendor/bootstrap.min.css">\n'
        '<a href="https://a.b/">a link</a>'
    )
    assert (tmp_path / "vendor" / "jquery-3.3.1.min.js").read_text(encoding="utf-8") == "dist/jquery.min.js"
    assert {path.name for path in (tmp_path / "vendor").iterdir()} == page.FILES.keys()


@pytest.mark.usefixtures("archives")
def test_a_script_that_is_not_known_is_refused(tmp_path):
    (tmp_path / "index.html").write_text('<script src="https://a.b/new.js"></script>', encoding="utf-8")
    with pytest.raises(RuntimeError, match=r"must link to known files alone. Got new\.js\."):
        page.make_local(tmp_path)


def test_the_page_of_asv_links_to_known_files_alone():
    import asv

    text = (Path(asv.__file__).parent / "www" / "index.html").read_text(encoding="utf-8")
    assert {name for _, name in page.LINK.findall(text)} == page.FILES.keys()


# nonlocal bench


BLOCK = ["backend", "device", "pairwise", "method", "geometry", "dtype"]
ABOUT = {
    "forward.Forward.time_forward": BLOCK,
    "forward.Forward.track_memory": BLOCK,
    "quality.Quality.track_cost": BLOCK,
    "scaling.Scaling.time_positions": ["backend", "device", "pairwise", "step", "positions"],
    "scaling.Scaling.track_memory": ["backend", "device", "pairwise", "step", "positions"],
    "scaling.Slope.track_time": ["backend", "device", "pairwise", "positions"],
    "scaling.Slope.track_memory": ["backend", "device", "pairwise", "positions"],
}
LACK = "out of memory: needs 9 GiB, 1 GiB are free"


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Return a folder of results as asv writes them: two implementations, one of which runs out of memory."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "benchmarks" / "results"
    (folder / "box").mkdir(parents=True)
    about = {name: {"param_names": names} for name, names in ABOUT.items()} | {"version": 2}
    (folder / "benchmarks.json").write_text(json.dumps(about), encoding="utf-8")
    ways = [["'torch'", "'torch_matrix'", "'mmcv'"], ["'cpu'"], ["'dot_product'"]]
    forward = [*ways, ["'auto'"], ["'small'", "'vast'"], ["'float32'"]]
    curve = [*ways, ["'training'"], ["1024", "4096", "16384"]]
    times = [1e-3, 4e-3, 16e-3, NAN, NAN, NAN, 1e-2, 0.16, None]
    data = {
        "commit_hash": "0123456789abcdef",
        "date": 86400000,
        "params": {"machine": "box", "num_cpu": "2", "cpu": "a chip", "ram": str(2**34), "python": "3.11"},
        "requirements": {"torch": "2"},
        "results": {
            "forward.Forward.time_forward": [[2e-3, NAN, 3e-3, NAN, 0.5, NAN], forward],
            "forward.Forward.track_memory": [[2**20, NAN, 2**21, NAN, 3 * 2**30, NAN], forward],
            "quality.Quality.track_cost": [[2.0, *[NAN] * 5], forward],
            "scaling.Scaling.time_positions": [times, curve],
            "scaling.Scaling.track_memory": [[t and t * 2**30 for t in times], curve],
            "scaling.Slope.track_time": [[1.12, 0.9], [["'jax'", "'torch'"], ["'cpu'"], ["'dot_product'"], ["65536"]]],
            "scaling.Slope.track_memory": [[1.04], [["'jax'"], ["'cpu'"], ["'dot_product'"], ["65536"]]],
            "gone.Gone.time_gone": [[1.0], []],
        },
        "notes": {"scaling.Scaling": {"'mmcv', 'cpu', 'dot_product', 'training', 16384": LACK}},
    }
    (folder / "box" / "01234567-python3.11.json").write_text(json.dumps(data), encoding="utf-8")
    return folder


def rows(out):
    """Return the rows of the printed tables, as lists of the text of their cells."""
    lines = [line.replace("|", "│") for line in out.splitlines()]
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line[:1] == "│"]


@pytest.mark.usefixtures("results")
@pytest.mark.parametrize("options", [[], ["--markdown"]])
def test_the_tables_set_implementations_side_by_side(options, capsys):
    assert main(["bench", *options]) == 0
    out = capsys.readouterr().out
    found = rows(out)
    assert ["dot_product", "small", "torch", "2 ms", "1 MiB", "50%"] in found
    assert [row[2:] for row in found if row[2:3] == ["torch, matrix"]] == [
        ["torch, matrix", "3 ms (1.5x)", "2 MiB (2x)", "-"]
    ]
    assert [row[2:] for row in found if row[2] == "mmcv"] == [["mmcv", "500 ms (250x)", "3 GiB (3072x)", "-"]]
    assert ["N^1.00", "N^1.00", "16,384"] in [row[2:] for row in found]
    assert [row[1:] for row in found if row[1].endswith("memory kept")] == [
        ["torch, memory kept", "N^0.90", "-", "65,536"],
        ["jax, memory kept", "N^1.12", "N^1.04", "65,536"],
    ]
    assert "Commit 01234567 of 1970-01-02 on box: 2 cores of a chip, 16 GiB, Python 3.11\ntorch 2\n" in out


@pytest.mark.usefixtures("results")
def test_the_picture_is_written(tmp_path):
    assert main(["bench", "--output", "curves.png"]) == 0
    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 300


def test_a_failure_with_a_reason_is_told_from_one_without(results):
    found = load(results).of("scaling.Scaling.time_positions")
    assert [one.note for one in found if one.value is None] == [LACK]
    assert len(found) == 6


@pytest.mark.usefixtures("results")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--results", "nowhere"],
            "argument --results: must be a folder of results, which `make bench` writes. Got no",
        ),
        (["--machine", "other"], "Got no results of machine 'other' in 'benchmarks/results'."),
        (["--commit", "ff"], "Got no results of commit 'ff' in 'benchmarks/results'."),
        (["--geometry", "vast"], "argument --geometry: must be one of small. Got 'vast'."),
        (["--output", "curves.txt"], "argument --output: must end in .png. Got 'curves.txt'."),
        (["--output", "nowhere/curves.png"], "argument --output: cannot write 'nowhere/curves.png': No such file"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(options, words, capsys):
    assert words in refusal(capsys, *options)


def refusal(capsys, *options):
    """Return the one line with which `nonlocal bench` refuses."""
    assert main(["bench", *options]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_results_that_asv_did_not_write_are_refused(results, capsys):
    (results / "benchmarks.json").write_text("[", encoding="utf-8")
    assert main(["bench"]) == 2
    assert "Got results in 'benchmarks/results' that asv did not write: " in capsys.readouterr().err


def product(data):
    data["results"]["scaling.Scaling.time_positions"] = [None, [[str(i) for i in range(10)]] * 12]


def long_parameter(data):
    data["results"]["scaling.Scaling.time_positions"] = [[1.0], [["1" * 101]] * 5]


WRONG_RESULTS = {
    "product": (product, "combinations of parameters"),
    "long": (long_parameter, "a parameter of 101 characters"),
    "date": (lambda data: data.update(date=1e300), ""),
    "number": (lambda data: data.update(date=10**400), ""),
    "machine": (lambda data: data.update(params={}), "results that cannot be shown: KeyError('machine')"),
    "commit": (lambda data: data.update(commit_hash=None), "results that cannot be shown: TypeError"),
}


@pytest.mark.parametrize(("change", "words"), WRONG_RESULTS.values(), ids=WRONG_RESULTS)
def test_results_of_another_form_are_refused_in_one_line(change, words, results, capsys):
    (file,) = (path for path in results.glob("*/*.json") if path.name != "machine.json")
    data = json.loads(file.read_text(encoding="utf-8"))
    change(data)
    file.write_text(json.dumps(data), encoding="utf-8")
    err = refusal(capsys)
    assert err.startswith("nonlocal: error: argument --results: must be a folder of results, which `make bench` writes")
    assert words in err


def test_a_key_that_stands_twice_in_results_is_refused(results, capsys):
    (results / "benchmarks.json").write_text('{"a": 1, "a": 2}', encoding="utf-8")
    assert main(["bench"]) == 2
    assert "The key 'a' stands twice in one object" in capsys.readouterr().err
