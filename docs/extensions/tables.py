r"""Directives that make the tables of the site from the code, so that none is typed by hand.

Each is a fence of MyST in a page, such as

    ```{options-table}
    ```

`options-table`
    The options of `NonLocalSpec`: name, default, meaning.
`presets-table`
    The presets: what each public implementation computes.
`cost-table`
    What blocks cost by each method. The content has one block a line, in the words of `nonlocal cost`:

        ```{cost-table}
        --preset official --shape 8x4x14x14x1024
        --pairwise concatenation --shape 1x28x28x512 --training
        ```
`checks-table`
    Each check, what must hold, and how often each backend is put through it, a case in a dtype at a time.
`capabilities-table`
    Each capability of a driver, and the backends that have it.
`faults-table`
    Each faulty implementation of the suite's own tests, and the checks that reject it.
`bench-table`
    What `make bench` measured. Its argument is `blocks` (time, memory and error by geometry), `growth` (the powers of
    N) or `machine` (commit, machine and versions, as a paragraph). Options: `:step:` forward or training (for growth),
    `:form:` and `:geometry:` leave the other rows of `blocks` out, `:device: gpu` shows the newest run on a GPU.
`command`
    A command and what it prints when the site is built. The build fails if its exit status is not `:status:` (0). It
    runs in the folder of the checkout, or in `:folder:`, relative to it:

        ```{command} nonlocal cost --preset official --shape 8x4x14x14x1024
        ```

Pictures: the build runs every `docs/figures/NAME.py` with one argument, a folder, and the script writes `NAME.svg` (or
`NAME.png`; several pictures begin with NAME) into it. A page shows it as `![what is seen](figures/made/NAME.svg)`. A
pair `![text](figures/made/NAME_light.svg){.only-light}` and `..._dark.svg){.only-dark}` follows the reader's theme;
without that, a picture stands on white in the dark theme.

MyST in pages: `$...$`, `$$...$$ (label)` and `{eq}`; `\\begin{aligned}` inside of `$$` only; headings have anchors;
`:::{name}` fences; tabs by `::::{tab-set}` with `:sync-group: framework` and `:sync: torch` (tensorflow, jax, numpy).

Links to the API: {py:func}`nonlocal_core.cost`, {py:class}`nonlocal_torch.NonLocalBlock`; a name that is not
there fails the build ({py:obj} would not). The guide of examples/insert.py is {doc}`guides/insert`. asv's own report
is `<a href="benchmarks/report/index.html">`, in a page at the top of docs/.

Toctrees, all hidden: index.md has `Start <install>`, guides/index, specification, methods, conformance, benchmarks,
api/index, contributing, which make the top bar; install.md has pytorch, tensorflow, jax; conformance.md has peers.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from nonlocal_bench import command as bench_command
from nonlocal_bench import results, tables
from nonlocal_conformance import loader
from nonlocal_conformance.capabilities import BACKENDS, CAPABILITIES
from nonlocal_conformance.registry import CHECKS, bind
from nonlocal_core import NonLocalSpec, cost
from nonlocal_core.commands import cost as cost_command
from nonlocal_core.spec.presets import PRESETS

__all__ = ["setup"]

ROOT = Path(__file__).parents[2]

SOURCES = ("nonlocal_core/**/*.py", "conformance/**/*.py", "benchmarks/results/**/*.json", "docs/*/*.py")
"""What a page with something generated depends on."""


def markdown(titles: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a table in Markdown."""
    titles = list(titles)
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def code(values: Iterable[object]) -> str:
    """Return values as code, with commas between them."""
    return ", ".join(f"`{value!r}`" if isinstance(value, tuple | bool | None) else f"`{value}`" for value in values)


def options() -> str:
    """Return the table of the options of a spec."""
    section = inspect.getdoc(NonLocalSpec).partition("Args:\n")[2].partition("\n\n")[0]
    meanings = dict(re.findall(r"^    (\w+): (.*?)(?=^    \w|\Z)", section, re.DOTALL | re.MULTILINE))
    rows = []
    for field in dataclasses.fields(NonLocalSpec):
        default = "" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
        rows.append((f"`{field.name}`", default, " ".join(meanings[field.name].split())))
    return markdown(("option", "default", "meaning"), rows)


def presets() -> str:
    """Return the table of the presets."""
    titles = ("preset", "implementation", "forms", "norms", "axes", "pools", "scale", "new block is the identity")
    rows = []
    for name, preset in PRESETS.items():
        windows = "no" if preset.window is None else code(dict.fromkeys(preset.window[rank] for rank in preset.ranks))
        rows.append(
            (
                f"`{name}`",
                preset.project,
                code(preset.forms),
                code(preset.norms),
                ", ".join(map(str, preset.ranks)),
                windows if preset.window is None else f"{windows} at the {preset.subsample_at}",
                code([preset.scale]),
                "yes" if preset.zero_init else "no",
            )
        )
    return markdown(titles, rows)


def costs(lines: Sequence[str]) -> str:
    """Return the table of what blocks cost, one a line, in the words of `nonlocal cost`."""
    parser = argparse.ArgumentParser()
    cost_command.add_parser(parser.add_subparsers())
    rows: list[list[str]] = []
    for line in lines:
        args = parser.parse_args(["cost", *shlex.split(line)])
        found = cost(cost_command.spec_of(args), args.shape, args.dtype, args.training, devices=args.devices)
        table = cost_command.table_of(found, cut=args.devices > 1)
        rows += [[f"`{line}`", f"{found.parameters:,}", *row] for row in cells(table)]
    titles = [str(column.header) for column in table.columns]
    return markdown(["Block", "Parameters", *titles], rows)


def cells(table: Any) -> list[list[str]]:
    """Return the rows of a table of rich."""
    return [list(map(str, row)) for row in zip(*(column.cells for column in table.columns), strict=True)]


def checks() -> str:
    """Return the table of the checks, with the number of their runs by backend."""
    bound = {name: bind(loader.load(name)) for name in BACKENDS}
    rows = []
    for name, check in CHECKS.items():
        counts = [sum(one.check is check for one in found) for found in bound.values()]
        rows.append((f"`{name}`", inspect.getdoc(check.run), *(count or "" for count in counts)))
    return markdown(("check", "what must hold", *bound), rows)


def capabilities() -> str:
    """Return the table of the capabilities, with the backends that have them."""
    rows = [
        (f"`{name}`", meaning, *("yes" if name in own else "" for own in BACKENDS.values()))
        for name, meaning in CAPABILITIES.items()
    ]
    return markdown(("capability", "meaning", *BACKENDS), rows)


def faults() -> str:
    """Return the table of the faulty implementations."""
    from faults import FAULTS

    rows = [(one.name.replace("_", " "), one.description, code(one.checks)) for one in FAULTS.values()]
    return markdown(("fault", "what is wrong", "rejected by"), rows)


def note_sources(directive: SphinxDirective) -> None:
    """Have the page of a directive made anew when the code has changed."""
    for path in (path for pattern in SOURCES for path in ROOT.glob(pattern)):
        directive.env.note_dependency(str(path))


class Table(SphinxDirective):
    """Put the table in its place that `text` makes."""

    def run(self) -> list[nodes.Node]:
        """Return the nodes of the table."""
        note_sources(self)
        return self.parse_text_to_nodes(self.text())

    def text(self) -> str:
        """Return the table in Markdown."""
        return MAKERS[self.name]()


MAKERS = {
    "options-table": options,
    "presets-table": presets,
    "checks-table": checks,
    "capabilities-table": capabilities,
    "faults-table": faults,
}


class CostTable(Table):
    """A table of what blocks cost."""

    has_content = True

    def text(self) -> str:
        """Return the table in Markdown."""
        return costs([line for line in self.content if line.strip()])


class BenchTable(Table):
    """A table of what the benchmarks measured."""

    required_arguments = 1
    option_spec: ClassVar = {
        "step": directives.unchanged,
        "form": directives.unchanged,
        "geometry": directives.unchanged,
        "device": directives.unchanged,
    }

    def text(self) -> str:
        """Return the table in Markdown."""
        device = self.options.get("device", "cpu")
        try:
            run = results.load(ROOT / "benchmarks" / "results", f"*-*{device}")
        except ValueError:
            if device == "cpu":
                raise
            return f"No results of a {device.upper()} are kept yet." if self.arguments[0] == "machine" else ""
        what = directives.choice(self.arguments[0], ("blocks", "growth", "machine"))
        if what == "machine":
            return bench_command.introduction(run).replace("\n", "\\\n")
        if what == "growth":
            table = tables.growth(run, self.options.get("step", "training"), markdown=True)
        else:
            known = dict.fromkeys(one.params["geometry"] for one in run.measurements if "geometry" in one.params)
            chosen = [self.options["geometry"]] if "geometry" in self.options else list(known)
            table = tables.blocks(run, chosen, markdown=True)
        form = self.options.get("form")
        rows = [row for row in cells(table) if form is None or row[0] == form]
        return markdown([str(column.header) for column in table.columns], rows)


class Command(SphinxDirective):
    """Show a command and what it prints."""

    required_arguments = 1
    final_argument_whitespace = True
    option_spec: ClassVar = {"folder": directives.unchanged, "status": int}

    def run(self) -> list[nodes.Node]:
        """Run the command and return what it prints, as code."""
        note_sources(self)
        program, *arguments = shlex.split(self.arguments[0])
        place = Path(sys.executable).with_name(program)
        settings = {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb", "TF_CPP_MIN_LOG_LEVEL": "3"}
        done = subprocess.run(
            [place, *arguments],
            cwd=ROOT / self.options.get("folder", "."),
            env={**os.environ, **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        expected = self.options.get("status", 0)
        if done.returncode != expected:
            message = f"`{self.arguments[0]}` must have exit status {expected}. Got {done.returncode}: {done.stdout}"
            raise self.error(message)
        text = f"$ {self.arguments[0]}\n{done.stdout.rstrip()}"
        return [nodes.literal_block(text, text, language="console")]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directives."""
    for name in MAKERS:
        app.add_directive(name, Table)
    app.add_directive("cost-table", CostTable)
    app.add_directive("bench-table", BenchTable)
    app.add_directive("command", Command)
    return {"parallel_read_safe": True}
