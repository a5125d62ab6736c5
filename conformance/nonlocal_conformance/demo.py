"""`nonlocal demo`, to which the loader of the drivers is handed in."""

from typing import Any

from nonlocal_conformance import loader
from nonlocal_core.commands.demo import command

__all__ = ["add_parser"]


def add_parser(subparsers: Any) -> None:
    """Add the command to the program."""
    command.add_parser(subparsers, loader)
