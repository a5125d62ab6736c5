"""`nonlocal demo`: what it prints, what it draws, and what it refuses."""

import io
import os
import re
import sys
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from nonlocal_conformance import loader
from nonlocal_conformance.drivers.numpy import NumpyDriver
from nonlocal_conformance.memory import peak_resident
from nonlocal_core.commands.demo import command as demo
from nonlocal_core.commands.demo import comparison, measurement, picture
from nonlocal_core.commands.demo.denoise import nonlocal_means, operands, psnr
from nonlocal_core.commands.program import main

SIZE = 24
SMALL = ["demo", "--size", str(SIZE)]
OURS = ["--backend", "numpy", "--backend", "torch"]

TOYS = """
from nonlocal_conformance.drivers.numpy import NumpyDriver

class Toy(NumpyDriver):
    name = "toy"
    dtypes = ("float64",)

class Wrong(Toy):
    def op(self, theta, phi, g):
        return super().op(theta, phi, g) + 0.25

class Unmeasured(Toy):
    capabilities = frozenset({"op"})
    peak_memory = None

class BlockAlone(Toy):
    capabilities = frozenset()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Work in an empty folder, with a terminal that is wide enough for the table."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


@pytest.fixture
def drawn(monkeypatch):
    """Return a dict that takes what is drawn, in place of the drawing."""
    taken = {}

    def draw(panels, weights, pixel, reach):
        taken.update(panels=panels, weights=weights, pixel=pixel, reach=reach)
        return b"drawn"

    monkeypatch.setattr(demo, "draw", draw)
    return taken


@pytest.fixture
def toys(folder, monkeypatch):
    """Make the backends of others importable."""
    (folder / "toys.py").write_text(TOYS, encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    yield
    sys.modules.pop("toys")


@pytest.fixture
def no_torch(monkeypatch):
    """Hide PyTorch from imports that are yet to come, and undo those that were."""
    for name in [name for name in sys.modules if name.endswith("drivers.torch")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)


def cells(out):
    """Return the rows of the printed table, as lists of text by the name of the backend."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line[:1] == "│"]
    return {row[0]: row[1:] for row in rows}


def decibels(cell):
    """Return the number in a cell of the column PSNR."""
    return float(re.fullmatch(r"([\d.]+) dB", cell)[1])


def colours(shape=(20, 30), mode="RGB"):
    """Return a smooth picture of that many rows and columns."""
    rows, columns = np.indices(shape)
    values = np.stack([rows * 8, columns * 6, rows + columns + 60, np.full(shape, 255)], axis=-1)
    return Image.fromarray(values.astype("uint8"), "RGBA").convert(mode)


# What it does


def test_it_denoises_the_built_in_photograph_with_every_backend(folder, capsys):
    assert main(SMALL) == 0
    out = capsys.readouterr().out
    rows = cells(out)
    installed = {driver.name for driver in loader.available()[0]}
    assert rows.keys() == installed >= {"numpy", "torch"}
    assert next(iter(rows)) == "numpy"
    assert rows["numpy"][:1] + rows["numpy"][3:4] == ["cpu", "-"]
    assert max(float(rows[name][3]) for name in installed - {"numpy"}) < 1e-5
    assert len({row[2] for row in rows.values()}) == 1
    assert decibels(rows["numpy"][2]) > 24
    assert "24 x 24 pixels, grey, noise 0.1 added: 19.98 dB" in out
    assert "331,776 pairs" in out
    with Image.open(folder / "demo.png") as image:
        assert (image.format, image.size) == ("PNG", (1380, 1380))


def test_the_panels_show_the_photograph_the_noise_and_the_result(drawn):
    assert main([*SMALL, *OURS]) == 0
    clean, noisy, denoised = (panel.image for panel in drawn["panels"])
    np.testing.assert_array_equal(clean, picture.built_in(SIZE))
    assert np.std(noisy - clean) == pytest.approx(0.1, rel=0.1)
    np.testing.assert_allclose(denoised, nonlocal_means(noisy, strength=0.7), rtol=1e-12)
    titles = [panel.title for panel in drawn["panels"]]
    assert titles == [
        "photograph",
        f"with noise: {psnr(clean, noisy):.1f} dB",
        f"denoised: {psnr(clean, denoised):.1f} dB",
    ]


def test_the_options_of_the_filter_reach_it(drawn):
    options = ["--strength", "0.5", "--reach", "inf", "--patch", "3", "--noise", "0.2", "--seed", "7"]
    assert main([*SMALL, *options, "--backend", "numpy"]) == 0
    clean, noisy, denoised = (panel.image for panel in drawn["panels"])
    expected = np.random.default_rng(7).normal(scale=0.2, size=clean.shape)
    np.testing.assert_array_equal(noisy, clean + expected)
    expected = nonlocal_means(noisy, strength=0.5, reach=np.inf, patch=3)
    np.testing.assert_allclose(denoised, expected, rtol=1e-12)


@pytest.mark.parametrize("pixel", [(0, 0), (5, 23), (23, 7)])
def test_the_weights_are_those_of_the_chosen_pixel(pixel, drawn):
    assert main([*SMALL, "--pixel", *map(str, pixel), "--backend", "torch"]) == 0
    assert drawn["pixel"] == pixel
    assert drawn["weights"].shape == (SIZE, SIZE)
    assert np.unravel_index(drawn["weights"].argmax(), (SIZE, SIZE)) == pixel
    assert drawn["weights"].sum() == pytest.approx(1)


def test_the_pixel_lies_on_an_edge_if_none_is_chosen():
    image = np.zeros((16, 20, 1))
    image[:, 9:] = 1
    row, column = picture.strong_edge(image)
    assert 4 <= row < 12
    assert column in {8, 9}


def test_only_the_backends_that_are_named_are_measured(capsys, drawn):
    assert main([*SMALL, "--backend", "torch", "--backend", "torch"]) == 0
    out = capsys.readouterr().out
    assert list(cells(out)) == ["torch"]
    assert float(cells(out)["torch"][3]) < 1e-5
    assert "from the reference at 576 pixels" in " ".join(out.split())
    assert drawn["panels"][2].title.startswith("denoised: 2")


def test_the_reference_needs_no_framework(capsys, drawn):
    assert main([*SMALL, "--backend", "numpy"]) == 0
    assert list(cells(capsys.readouterr().out)) == ["numpy"]
    assert drawn


@pytest.mark.usefixtures("drawn", "toys")
@pytest.mark.parametrize(("driver", "difference"), [("Toy", 0), ("Wrong", 0.25)])
def test_a_backend_of_others_is_measured_by_its_address(driver, difference, capsys):
    assert main([*SMALL, "--backend", "numpy", "--backend", f"toys:{driver}"]) == 0
    rows = cells(capsys.readouterr().out)
    assert list(rows) == ["numpy", "toy"]
    assert float(rows["toy"][3]) == pytest.approx(difference, abs=1e-12)


@pytest.mark.usefixtures("drawn", "toys")
def test_a_backend_that_cannot_measure_its_memory_has_a_dash_there(capsys):
    assert main([*SMALL, "--backend", "toys:Unmeasured"]) == 0
    assert cells(capsys.readouterr().out)["toy"][4] == "-"


@pytest.mark.usefixtures("drawn", "no_torch")
def test_a_missing_framework_is_listed_with_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(loader, "_names", lambda: ["numpy", "torch"])
    assert main(SMALL) == 0
    out = capsys.readouterr().out
    assert list(cells(out)) == ["numpy"]
    assert "Not measured: backend 'torch' cannot be imported" in out
    assert 'pip install "nonlocal-core[torch]"' in " ".join(out.split())


@pytest.mark.usefixtures("drawn", "toys")
def test_an_installed_backend_without_the_operation_is_listed(monkeypatch, capsys):
    monkeypatch.setattr(loader, "_names", lambda: ["numpy", "toys:BlockAlone"])
    assert main(SMALL) == 0
    out = capsys.readouterr().out
    assert list(cells(out)) == ["numpy"]
    assert "Not measured: backend 'toy' has the block alone, without its operation." in out


def test_a_picture_that_has_noise_is_taken_as_it_is(drawn, capsys):
    noise = np.random.default_rng(0).normal(scale=25, size=(20, 30))
    Image.fromarray(np.clip(128 + noise, 0, 255).astype("uint8")).save("noisy.png")
    assert main(["demo", "noisy.png", "--noise", "0", *OURS]) == 0
    out = capsys.readouterr().out
    estimate = float(re.search(r"noise estimated at ([\d.]+)", out)[1])
    assert estimate == pytest.approx(25 / 255, rel=0.15)
    assert " dB" not in out
    first, removed, denoised = (panel.image for panel in drawn["panels"])
    assert [panel.title for panel in drawn["panels"]][::2] == ["photograph", "denoised"]
    np.testing.assert_allclose(removed, first - denoised + 0.5)
    assert denoised.std() < first.std() / 2


def test_a_picture_without_any_noise_can_be_taken_as_it_is(drawn):
    Image.new("L", (6, 5), 77).save("flat.png")
    assert main(["demo", "flat.png", "--noise", "0", *OURS]) == 0
    np.testing.assert_allclose(drawn["panels"][2].image, 77 / 255)


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_scikit_image_is_measured_on_the_same_picture(mode, capsys, monkeypatch):
    monkeypatch.setattr(comparison, "_DISTANCES", (2, 3))
    colours(mode=mode).save("file.png")
    assert main(["demo", "file.png", "--backend", "torch", "--compare"]) == 0
    out = capsys.readouterr().out
    rows = cells(out)
    assert list(rows)[0::2] == ["torch", "scikit-image 59 x 59"]
    assert list(rows)[1] in {"scikit-image 5 x 5", "scikit-image 7 x 7"}
    assert min(decibels(row[2]) for row in rows.values()) > 22
    assert "for which one must have the clean picture" in " ".join(out.split())


def test_the_matrix_of_weights_is_never_held():
    image = np.random.default_rng(0).uniform(size=(48, 48, 1))
    arrays = operands(image, strength=0.7)
    tracemalloc.start()
    measurement.measured(loader.load("numpy"), [], arrays, whole=True, console=Console(file=io.StringIO()))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * (48 * 48) ** 2 / 5


class Recorder(NumpyDriver):
    """A framework that takes down how many weights it met at once."""

    def __init__(self, *capabilities):
        super().__init__()
        self.capabilities = frozenset(capabilities)
        self.met = []

    def op(self, theta, phi, g):
        self.met.append(theta.shape[1] * phi.shape[1])
        return super().op(theta, phi, g)


@pytest.mark.parametrize(
    ("capabilities", "most"), [(["op"], 5000), (["op", "peak_memory"], 420**2)], ids=["matrix", "streamed"]
)
def test_a_framework_that_may_hold_the_matrix_meets_a_part_of_it_at_once(capabilities, most, monkeypatch):
    monkeypatch.setattr(measurement, "_CHUNK", 5000)
    arrays = operands(np.random.default_rng(0).uniform(size=(20, 21, 1)), strength=0.7)
    recorder = Recorder(*capabilities)
    console = Console(file=io.StringIO())
    (_, _), (y, row) = measurement.measured(loader.load("numpy"), [recorder], arrays, whole=True, console=console)
    assert sum(recorder.met) == 2 * 420**2
    assert 0.9 * most < max(recorder.met) <= most
    assert y.shape == (420, 1)
    assert row.difference < 1e-5


# Files


@pytest.mark.parametrize("mode", ["L", "1", "LA", "RGB", "RGBA", "P"])
def test_a_png_of_any_kind_is_read(mode):
    colours(mode=mode).save("file.png")
    image = picture.read("file.png", 100)
    channels = 1 if mode in {"L", "1", "LA"} else 3
    assert image.shape == (20, 30, channels)
    expected = np.asarray(colours(mode=mode).convert("L" if channels == 1 else "RGB")) / 255
    np.testing.assert_allclose(image, expected.reshape(image.shape))


def test_a_png_of_16_bits_is_read_in_full():
    values = np.arange(600, dtype="uint16").reshape(20, 30) * 100
    Image.fromarray(values).save("file.png")
    np.testing.assert_allclose(picture.read("file.png", 100)[..., 0], values / 65535, rtol=1e-6)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_jpeg_is_read(mode):
    colours(mode=mode).save("file.jpg", quality=95)
    image = picture.read("file.jpg", 100)
    expected = np.asarray(colours(mode=mode).convert("L" if mode == "L" else "RGB")) / 255
    np.testing.assert_allclose(image, expected.reshape(image.shape), atol=0.1)


def test_a_photograph_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    colours().save("file.jpg", exif=exif)
    assert picture.read("file.jpg", 100).shape == (30, 20, 3)


def test_what_is_transparent_is_white():
    Image.new("RGBA", (4, 3), (0, 0, 0, 0)).save("file.png")
    np.testing.assert_array_equal(picture.read("file.png", 100), np.ones((3, 4, 3)))


@pytest.mark.parametrize(("size", "shape"), [(100, (20, 30)), (30, (20, 30)), (15, (10, 15)), (1, (1, 1))], ids=str)
def test_a_file_is_made_to_fit_and_keeps_its_proportions(size, shape):
    colours().save("file.png")
    assert picture.read("file.png", size).shape == (*shape, 3)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (2, 2), (9, 1)], ids=str)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_tiny_picture_is_denoised_and_drawn(shape, mode):
    colours(shape, mode).save("tiny.png")
    assert main(["demo", "tiny.png", "--output", "out.png", *OURS]) == 0
    with Image.open("out.png") as image:
        image.load()
        assert 300 < min(image.size) <= max(image.size) < 1500


def test_the_largest_crop_is_the_whole_photograph():
    assert picture.built_in(512).shape == (512, 512, 1)


# What it refuses


def write_text():
    Path("text.png").write_text("a thousand words", encoding="utf-8")


def write_gif():
    colours(mode="P").save("moving.gif")


def write_cut(name="cut.png", form="PNG", share=0.5):
    """Write the first part of a picture."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, size=(60, 80, 3), dtype="uint8")
    Image.fromarray(noise).save(buffer, form)
    Path(name).write_bytes(buffer.getvalue()[: int(share * buffer.tell())])


def write_many(times=1):
    """Write a small file of a few more pixels than a photograph has, or of far more."""
    Image.new("1", (2**13, times * 2**12 + 1)).save("many.png")


def write_scans():
    """Write a JPEG file that goes over its pixels very often."""
    buffer = io.BytesIO()
    Image.new("L", (4096, 4096), 128).save(buffer, "JPEG", progressive=True)
    start, *scans = buffer.getvalue().split(b"\xff\xda")
    Path("scans.jpg").write_bytes(b"\xff\xda".join([start, scans[0], *scans[1:2] * 600, *scans[2:]]))


WRONG_FILES = {
    "missing": (lambda: None, "none.png", "No such file or directory"),
    "folder": (lambda: None, ".", "Is a directory"),
    "text": (write_text, "text.png", "must be a PNG or JPEG file. Got 'text.png', which is neither"),
    "gif": (write_gif, "moving.gif", "must be a PNG or JPEG file. Got 'moving.gif', which is neither"),
    "cut": (write_cut, "cut.png", "that can be read. Got 'cut.png'"),
    "pipe": (lambda: os.mkfifo("pipe.png"), "pipe.png", "`path` must name a regular file. Got 'pipe.png'"),
    "device": (lambda: None, "/dev/zero", "`path` must name a regular file. Got '/dev/zero'"),
    "many": (write_many, "many.png", "at most 33554432 pixels, or --most-pixels must allow more. Got 'many.png'"),
    "more": (partial(write_many, 30), "many.png", "at most 33554432 pixels, or --most-pixels must allow more."),
    "scans": (write_scans, "scans.jpg", "it has more than 106 scans"),
}


@pytest.mark.parametrize(("write", "name", "words"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_a_wrong_file_is_refused_in_one_line(write, name, words, capsys, folder):
    write()
    before = sorted(folder.iterdir())
    assert main(["demo", name]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("nonlocal: error: argument FILE: ")
    assert words in err
    assert err.count("\n") == 1
    assert sorted(folder.iterdir()) == before


def test_more_pixels_are_read_if_that_is_asked_for(folder):
    write_many()
    image, peak = peak_resident(lambda: picture.read(folder / "many.png", 32, pixels=2**26))
    assert (image.shape, peak < 32 * 2**25) == ((16, 32, 1), True)
    assert Image.MAX_IMAGE_PIXELS > 2**26


@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_a_picture_that_was_cut_off_is_refused(form, share):
    write_cut("cut", form, share)
    with pytest.raises(ValueError, match="must be a PNG or JPEG file"):
        picture.read("cut", 100)


WRONG_OPTIONS = {
    "--size": [["0"], ["-3"], ["2.5"], ["many"], ["513"]],
    "--noise": [["-0.1"], ["nan"], ["inf"], ["loud"], ["1e308"], ["1e-320"]],
    "--strength": [["0"], ["-1"], ["inf"], ["nan"], ["1e-300"], ["1e-20"]],
    "--reach": [["0"], ["nan"], ["-2"], ["1e-320"]],
    "--patch": [["4"], ["0"], ["-5"], ["3.0"], ["33"], ["999999999"]],
    "--most-pixels": [["0"], ["many"]],
    "--seed": [["-1"], ["x"]],
    "--pixel": [["1"], ["24", "0"], ["0", "24"], ["-1", "0"], ["0", "x"]],
    "--output": [["out.jpg"], ["."], ["folder.png"], ["none/out.png"], ["file/out.png"], ["x" * 300 + ".png"]],
    "--backend": [["tourch"], ["no_such_package:Driver"], ["json:Driver"]],
    "--compare": [["--noise", "0"]],
    "--device": [["abacus"]],
}


@pytest.mark.parametrize(
    ("option", "values"), [(option, values) for option, many in WRONG_OPTIONS.items() for values in many]
)
def test_a_wrong_option_is_refused_in_one_line_that_names_it(option, values, capsys, folder):
    (folder / "folder.png").mkdir()
    (folder / "file").touch()
    before = sorted(folder.rglob("*"))
    assert main([*SMALL, option, *values]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("nonlocal: error: ")
    assert option in err
    assert err.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


def test_a_device_that_a_named_backend_lacks_is_refused(capsys):
    assert main([*SMALL, "--backend", "torch", "--device", "abacus"]) == 2
    assert "argument --backend torch: `device` must" in capsys.readouterr().err


@pytest.mark.usefixtures("toys")
def test_a_named_backend_without_the_operation_is_refused(capsys):
    assert main([*SMALL, "--backend", "toys:BlockAlone"]) == 2
    assert "argument --backend toys:BlockAlone: has the block alone" in capsys.readouterr().err


@pytest.mark.usefixtures("no_torch")
def test_a_named_backend_whose_framework_is_missing_is_refused(capsys):
    assert main([*SMALL, "--backend", "torch"]) == 2
    assert 'pip install "nonlocal-core[torch]"' in capsys.readouterr().err


@pytest.mark.parametrize("module", ["matplotlib", "PIL", "rich", "skimage"])
def test_a_missing_extra_is_refused_with_what_to_install(module, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    assert main(SMALL) == 2
    err = capsys.readouterr().err
    assert f'needs {module!r}: pip install "nonlocal-core[demo]"' in err
    assert err.count("\n") == 1


def fail(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.usefixtures("drawn")
def test_a_full_disk_is_an_error_and_leaves_the_old_picture(monkeypatch, capsys, folder):
    (folder / "demo.png").write_bytes(b"old")
    monkeypatch.setattr("pathlib.Path.replace", fail)
    assert main([*SMALL, "--backend", "torch"]) == 2
    assert "argument --output: cannot write 'demo.png': No space left" in capsys.readouterr().err
    assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [("demo.png", b"old")]


@pytest.mark.usefixtures("drawn")
def test_an_old_picture_is_replaced(folder):
    (folder / "demo.png").write_bytes(b"old")
    assert main([*SMALL, "--backend", "torch"]) == 0
    assert (folder / "demo.png").read_bytes() == b"drawn"
