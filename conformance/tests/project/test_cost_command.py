"""`nonlocal cost`: what it prints and what it refuses."""

import re
import sys

import pytest

import nonlocal_core as nlc
from nonlocal_core.commands import cost as cost_command
from nonlocal_core.commands.program import Parser, main

OFFICIAL = ["--preset", "official", "--shape", "8x4x14x14x1024"]


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """Print to a terminal that is wide enough for the table."""
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def printed(capsys):
    """Return what the command prints."""

    def run(*argv):
        assert main(["cost", *argv]) == 0
        return capsys.readouterr().out

    return run


def cells(text):
    """Return the rows of a printed table, by their first cell."""
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if "│" in line]
    return {row[0]: row[1:] for row in rows}


def spec_of(*argv):
    """Return the spec that a command line describes."""
    parser = Parser()
    cost_command.add_parser(parser.add_subparsers())
    return cost_command.spec_of(parser.parse_args(["cost", *argv]))


def test_the_table_holds_the_cost_of_every_method(printed):
    text = printed(*OFFICIAL)
    found = nlc.cost(nlc.NonLocalSpec.preset("official", channels=1024), (8, 4, 14, 14, 1024))
    assert "2,101,760 parameters" in text
    assert cells(text) == {
        name: [f"{cost.flops / 1e9:.1f}", f"{cost.bytes_moved / 2**20:.0f}", f"{cost.peak_memory / 2**20:.1f}"]
        for name, cost in found.methods.items()
    }


def test_a_training_step_and_another_dtype_have_their_own_cost(printed):
    text = printed(*OFFICIAL, "--training", "--dtype", "bfloat16", "--pairwise", "dot_product")
    spec = nlc.NonLocalSpec.preset("official", channels=1024, pairwise="dot_product")
    found = nlc.cost(spec, (8, 4, 14, 14, 1024), "bfloat16", training=True).methods["reassociated"]
    assert cells(text)["reassociated"][1] == f"{found.bytes_moved / 2**20:,.0f}"
    assert "bfloat16, a training step" in text
    assert "the output, and their gradients" in text.replace("\n", " ")


def test_one_of_several_devices_has_its_own_cost(printed):
    text = printed(*OFFICIAL, "--devices", "4", "--training")
    spec = nlc.NonLocalSpec.preset("official", channels=1024)
    found = nlc.cost(spec, (8, 4, 14, 14, 1024), training=True, devices=4).methods["streamed"]
    assert cells(text)["streamed"][3] == f"{found.bytes_received / 2**20:#.3g}"
    assert "a training step, each of 4 devices" in text
    assert "received: the gradients of the parameters are left out" in " ".join(text.split()).lower()


def test_a_small_number_keeps_three_digits(printed):
    # 160 FLOPs, 520 bytes, and 64 bytes at the most: theta, phi, g and the scores.
    assert cells(printed("--shape", "1x2x4"))["pairwise"] == ["1.60e-07", "0.000496", "6.10e-05"]


def test_a_large_number_has_no_exponent(printed):
    flops = 2 * 64 * (4 * 50176 * 256 * 128 + 2 * 50176**2 * 128)
    assert cells(printed("--shape", "64x16x56x56x256"))["pairwise"][0] == f"{flops / 1e9:,.0f}"


@pytest.mark.parametrize(
    ("argv", "options"),
    [
        ([], {}),
        (["--pairwise", "concatenation", "--inner-channels", "3"], {"pairwise": "concatenation", "inner_channels": 3}),
        (["--subsample", "2", "--subsample-at", "input"], {"subsample": 2, "subsample_at": "input"}),
        (["--subsample", "1x2x2"], {"subsample": (1, 2, 2)}),
        (["--axes", "space", "--norm", "batch"], {"axes": "space", "norm": "batch"}),
        (["--group-size", "2", "--norm", "affine"], {"group_size": 2, "norm": "affine"}),
    ],
)
def test_an_option_is_that_of_the_spec(argv, options):
    assert spec_of("--shape", "1x4x6x6x16", *argv) == nlc.NonLocalSpec(channels=16, **options)


def test_an_option_replaces_that_of_the_preset():
    spec = nlc.NonLocalSpec.preset("official", channels=1024, subsample=None, norm=None)
    assert spec_of(*OFFICIAL, "--subsample", "none", "--norm", "none") == spec


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--preset", "offical", "--shape", "1x8x4"], "argument --preset: must be one of 'official', .*Got 'offical'"),
        (["--shape", "8"], "argument --shape: must be 3, 4 or 5 positive sizes, .*Got '8'"),
        (["--shape", "8x0x4"], "argument --shape: must be .*Got '8x0x4'"),
        (["--shape", "8x4x"], "argument --shape: must be .*Got '8x4x'"),
        ([], "required: --shape"),
        (["--preset", "official", "--shape", "1x8x4"], "`rank` must be 3 for the preset 'official'. Got 1"),
        (["--shape", "1x8x4", "--pairwise", "sine"], "argument --pairwise: must be one of .*Got 'sine'"),
        (["--shape", "1x8x4", "--inner-channels", "0"], "argument --inner-channels: must be a positive int. Got '0'"),
        (["--shape", "1x8x4", "--subsample", "two"], "argument --subsample: must be 'none', .*Got 'two'"),
        (["--shape", "1x8x4", "--subsample", "9"], "`subsample` must leave at least one window on spatial axis 0"),
        (["--shape", "1x8x4", "--subsample", "2x2"], "`x` must have 2 spatial axes, .*Got 1 spatial axes"),
        (["--shape", "1x8x4", "--subsample-at", "home"], "argument --subsample-at: must be one of .*Got 'home'"),
        (["--shape", "1x8x4", "--axes", "time"], "`x` must have 3 spatial axes"),
        (["--shape", "1x8x4", "--norm", "layer"], "argument --norm: must be one of 'none', .*Got 'layer'"),
        (["--shape", "1x8x4", "--dtype", "int8"], "argument --dtype: must be one of 'float16', .*Got 'int8'"),
        (["--shape", "1x1x4", "--norm", "batch", "--training"], "more than one value per channel in training"),
    ],
)
def test_a_wrong_option_is_one_line_and_status_2(argv, words, capsys):
    assert main(["cost", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert re.search(words, err)


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["cost", *OFFICIAL]) == 2
    assert "needs 'rich': pip install" in capsys.readouterr().err
