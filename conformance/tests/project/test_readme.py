"""The README and the pages of the site: their code prints what it says, commands, links and options exist."""

import contextlib
import dataclasses
import io
import re
import shutil
from pathlib import Path

import pytest

from nonlocal_conformance.cases import CASES
from nonlocal_conformance.drivers.numpy import NumpyDriver
from nonlocal_core import NonLocalSpec

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
FRAMEWORKS = ["docs/pytorch.md", "docs/tensorflow.md", "docs/jax.md"]
PROGRAMS = [*FRAMEWORKS, "docs/specification.md", "docs/methods.md"]
PAGES = ["README.md", "CONTRIBUTING.md", *FRAMEWORKS]


def text_of(page):
    """Return the text of a page."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(text):
    """Return the Python blocks of a Markdown text, each at the line on which it stands there."""
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return ["\n" * text.count("\n", 0, match.start(1)) + match[1] for match in found]


def program(text):
    """Return the Python blocks of a page as one program, each line where it stands there."""
    lines = []
    for block in blocks(text):
        lines += block.splitlines()[len(lines) :]
    return "\n".join(lines)


def promised(code):
    """Return what the comments behind the calls of print promise."""
    return re.findall(r"^ *print\(.*\)  # (.+)$", code, re.MULTILINE)


def printed(code, page="README.md"):
    """Run the code of a page and return the lines that it prints."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(code, page, "exec"), {"__name__": "readme"})  # noqa: S102 - the reader's own steps
    return output.getvalue().splitlines()


def anchors(page):
    """Return the anchors of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def first_import(code):
    """Return the first line of a block, as its name."""
    return code.lstrip().splitlines()[0]


@pytest.fixture
def _few_cases(monkeypatch):
    """Let a program run the checks on one case: test_contract.py runs them on all."""
    monkeypatch.setattr(NumpyDriver, "cases", (CASES["dot_product_2d"],), raising=False)


@pytest.mark.usefixtures("_few_cases")
@pytest.mark.parametrize("code", [*blocks(README), *blocks(text_of("docs/index.md"))], ids=first_import)
def test_the_code_runs_and_prints_what_it_says(code):
    assert printed(code) == promised(code)


def test_the_look_at_the_code_finds_a_wrong_promise():
    (code,) = blocks("```python\nprint(1 + 1)  # 3\n```\n")
    assert (printed(code), promised(code)) == (["2"], ["3"])


@pytest.fixture
def compiler():
    """Let PyTorch run what it would compile, where there is no compiler for C++."""
    if shutil.which("g++") or shutil.which("clang++"):
        yield
    else:
        import torch

        with torch.compiler.set_stance("force_eager"):
            yield


# Keras gives its weights to NumPy in the old way when it writes a file, and PyTorch's compiler imports such modules.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("page", PROGRAMS)
def test_the_code_of_a_page_is_one_program_that_prints_what_it_says(page):
    code = program(text_of(page))
    assert printed(code, page) == promised(code) != []


def test_the_parts_of_a_program_stand_on_the_lines_of_the_page():
    text = "Let\n```python\na = 1\n```\nand\n\n```python\n\nprint(a)  # 1\n```\n"
    assert program(text).splitlines() == ["", "", "a = 1", "", "", "", "", "", "print(a)  # 1"]
    assert printed(program(text)) == promised(program(text))


@pytest.mark.parametrize("package", ["nonlocal_core", "nonlocal_torch", "nonlocal_tensorflow", "nonlocal_jax"])
def test_there_is_an_example_for_each_backend(package):
    assert any(re.search(rf"^(from|import) {package}\b", code, re.MULTILINE) for code in blocks(README))


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake ([a-z]+)\b", README))))
def test_the_commands_are_targets_of_the_makefile(target):
    assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE)


@pytest.mark.parametrize(
    ("page", "link"),
    [
        pytest.param(page, link, id=f"{page}-{link}")
        for page in PAGES
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text_of(page))
    ],
)
def test_a_link_leads_to_a_file_and_a_heading_that_exist(page, link):
    target, _, anchor = link.partition("#")
    place = (ROOT / page).parent / target if target else ROOT / page
    assert place.is_file()
    assert not anchor or anchor in anchors(place)


def test_the_table_lists_every_option_with_its_default():
    rows = re.findall(r"^\| `(\w+)` \|(.*?)\|", README, re.MULTILINE)
    listed = {name: default.strip("` ").replace('"', "'") for name, default in rows}
    absent = dataclasses.MISSING
    options = {
        field.name: "" if field.default is absent else repr(field.default) for field in dataclasses.fields(NonLocalSpec)
    }
    assert listed == options
