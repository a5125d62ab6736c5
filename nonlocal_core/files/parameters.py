"""Parameters in a file: safetensors, with the spec in its metadata. Nothing in such a file is executed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any, BinaryIO, NoReturn

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from nonlocal_core.arguments import read_json
from nonlocal_core.errors import shortened
from nonlocal_core.files.atomic_write import replace_file
from nonlocal_core.files.conversion import to_numpy
from nonlocal_core.files.regular import open_file, read_exactly
from nonlocal_core.spec import SPECIFICATION_VERSION, NonLocalSpec
from nonlocal_core.spec.calls import check_spec
from nonlocal_core.spec.parameters import check_params, param_shapes

__all__ = ["load_params", "save_params"]

_FORMAT = 1
# One key, since safetensors writes several in any order: equal parameters shall give equal files.
_KEY = "nonlocal_core"
_DTYPES = {"F16": "float16", "F32": "float32", "F64": "float64"}
_LONGEST_HEADER = 2**20
"""In bytes; those of the largest blocks have some thousands."""


def save_params(path: str | os.PathLike[str], params: Mapping[str, Any], spec: NonLocalSpec) -> None:
    """Write parameters and their spec to a file, which `load_params` reads.

    The file is written beside its place and then moved there: at no time is there half a file.

    Args:
        path: the file; one that is there is replaced, and keeps its permissions.
        params: the canonical parameters: arrays of float16, float32 or float64, of any library; bfloat16 is written
            as float32, which holds it exactly.
        spec: the block to which they belong.

    Raises:
        TypeError: if an argument or a parameter has a wrong type.
        ValueError: if the parameters are not those of `spec`, or its `pairwise` is a function.
        OSError: if the file cannot be written.

    Example:
        >>> import tempfile
        >>> from nonlocal_core import init_params
        >>> spec = NonLocalSpec(channels=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_params(f"{folder}/block.safetensors", init_params(spec, np.random.default_rng(0)), spec)
        ...     params, loaded = load_params(f"{folder}/block.safetensors")
        >>> loaded == spec, params["out.weight"].shape
        (True, (4, 2))
    """
    check_spec(spec)
    content = {"format": _FORMAT, "specification": SPECIFICATION_VERSION, "spec": json.loads(spec.to_json())}
    metadata = {_KEY: json.dumps(content)}
    if isinstance(params, Mapping):
        params = {name: to_numpy(f"params[{name!r}]", array) for name, array in params.items()}
    check_params(params, spec)
    replace_file(path, save(dict(params), metadata))


def load_params(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray[Any, Any]], NonLocalSpec]:
    """Read what `save_params` wrote.

    Args:
        path: the file.

    Returns:
        The parameters, in the order of `param_shapes` and with the dtypes that they had, and the spec.

    Raises:
        TypeError: if `path` is no path.
        ValueError: if the file is damaged, was not written by `save_params`, or is no regular file.
        OSError: if the file cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        ...     load_params(file.name)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: `path` must name a whole file that `save_params` wrote. Got ...
    """
    with open_file(path) as file:
        try:
            start, header = _start_of(file)
            spec = _spec_of(header.pop("__metadata__", {}))
            # Before a number is read: there may be more than any memory holds, and the spec tells how many belong.
            announced = {name: _announced(name, entry) for name, entry in header.items()}
            check_params(announced, spec)
            size = sum(array.nbytes for array in announced.values())
            if os.fstat(file.fileno()).st_size != len(start) + size:
                _refuse(f"it has not the {len(start) + size} bytes of these parameters.")
            arrays = load(start + read_exactly(file, size))
        except (SafetensorError, RecursionError, TypeError, ValueError) as error:
            rule, place = "name a whole file that `save_params` wrote", os.fspath(path)
            message = f"`path` must {rule}. Got {place!r}: {shortened(str(error))}"
            raise ValueError(message) from error
    return {name: arrays[name] for name in param_shapes(spec)}, spec


def _refuse(what: str) -> NoReturn:
    raise ValueError(what)


def _start_of(file: BinaryIO) -> tuple[bytes, dict[str, dict[str, Any]]]:
    """Return the header of a safetensors file, as the bytes to its end and as what it says."""
    length = file.read(8)
    size = int.from_bytes(length, "little")
    try:
        if size > _LONGEST_HEADER:
            _refuse(f"{size} bytes, where {_LONGEST_HEADER} are the most")
        start = length + file.read(size)
        header = read_json(start[8:].decode())
        if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
            _refuse("not an object of objects")
    except ValueError as error:
        message = f"it has no header of safetensors: {error}"
        raise ValueError(message) from error
    return start, header


def _spec_of(metadata: Mapping[str, str]) -> NonLocalSpec:
    """Return the spec from the metadata of a file."""
    content = read_json(metadata.get(_KEY, "null"))
    if not isinstance(content, dict) or not {"format", "spec"} <= content.keys():
        _refuse(f"it has no format and spec in its metadata under {_KEY!r}.")
    if content["format"] != _FORMAT:
        _refuse(f"it has format {content['format']!r}, and this version reads format {_FORMAT}.")
    written = content.get("specification", SPECIFICATION_VERSION)  # which the first files do not tell
    parts = re.fullmatch(r"(\d{1,9})\.\d{1,9}", str(written))
    if parts is None or int(parts[1]) > int(SPECIFICATION_VERSION.partition(".")[0]):
        _refuse(f"it is of specification {written!r}, and this version computes {SPECIFICATION_VERSION}.")
    return NonLocalSpec.from_json(json.dumps(content["spec"]))


def _announced(name: str, entry: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """Return an array of the shape and dtype that the header gives, in one number's memory."""
    dtype = entry.get("dtype")
    if dtype not in _DTYPES:
        _refuse(f"it holds {name!r} in the dtype {dtype}.")
    return np.broadcast_to(np.zeros((), _DTYPES[dtype]), entry.get("shape", ()))
