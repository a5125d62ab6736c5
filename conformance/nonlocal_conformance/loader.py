"""The installed backends: the entry points of the group "nonlocal_core.backends", ours and others' alike."""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from nonlocal_core.errors import fail_value

__all__ = ["GROUP", "available", "load"]

GROUP = "nonlocal_core.backends"
"""The entry-point group; an entry names a class whose instances, `Driver(device)`, run one backend."""

_ADDRESS = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def load(name: str, device: str = "cpu") -> Any:
    """Return the driver of one backend.

    Args:
        name: the name of an entry of the group, or `package.module:Driver`.
        device: where it computes, in the backend's own words, for example "cpu" or "cuda".

    Returns:
        An instance of the driver.

    Raises:
        ImportError: if the backend, or the framework that it needs, is not installed.
        ValueError: if there is no backend of that name, or the backend has no such device.

    Example:
        >>> load("numpy").name
        'numpy'
    """
    return _start(_entry(name), device)


def available(device: str = "cpu") -> tuple[list[Any], dict[str, str]]:
    """Return the drivers of all backends that run here, and why the others do not.

    Args:
        device: where they compute.

    Returns:
        The drivers, in the order of their names, and a mapping from the name of each backend that cannot be
        imported or has no such device to the reason.

    Example:
        >>> drivers, missing = available()
        >>> "numpy" in [driver.name for driver in drivers]
        True
    """
    drivers, missing = [], {}
    for name in _names():
        try:
            drivers.append(load(name, device))
        except (ImportError, ValueError) as error:
            missing[name] = str(error)
    return drivers, missing


def _names() -> list[str]:
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def _entry(name: str) -> EntryPoint:
    if _ADDRESS.fullmatch(name):
        return EntryPoint(name, name, GROUP)
    # One installation may be visible twice; two different drivers of one name may not.
    entries = {entry.value: entry for entry in entry_points(group=GROUP, name=name)}
    if not entries:
        raise fail_value("backend", f"be one of {_names()} or package.module:Driver", repr(name))
    if len(entries) > 1:
        raise fail_value("backend", f"be one of {sorted(entries)}, which share a name", repr(name))
    return next(iter(entries.values()))


def _start(entry: EntryPoint, device: str) -> Any:
    try:
        driver = entry.load()
    except ImportError as error:
        ours = entry.dist is not None and entry.dist.name == "nonlocal-core"
        remedy = f' Install it with `pip install "nonlocal-core[{entry.name}]"`.' if ours else ""
        message = f"backend {entry.name!r} cannot be imported: {_sentence(error)}{remedy}"
        raise ImportError(message) from error
    except AttributeError as error:
        raise fail_value("backend", "name a driver class that exists", repr(entry.value)) from error
    if not (isinstance(driver, type) and callable(getattr(driver, "block", None))):
        raise fail_value("backend", "be a driver class, which has a method `block`", repr(entry.value))
    try:
        return driver(device)
    except RuntimeError as error:
        # What frameworks raise for a device that they do not know or cannot start.
        reason = str(error).partition("\n")[0]
        raise fail_value("device", f"be one of the backend {entry.name!r}", f"{device!r}: {reason}") from error


def _sentence(error: ImportError) -> str:
    return f"{error}".rstrip(".") + "."
