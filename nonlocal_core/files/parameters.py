"""Parameters in a file: safetensors, with the spec in its metadata. Nothing in such a file is executed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from nonlocal_core.files.atomic_write import replace_file
from nonlocal_core.files.conversion import to_numpy
from nonlocal_core.spec import SPECIFICATION_VERSION, NonLocalSpec
from nonlocal_core.spec.calls import check_spec
from nonlocal_core.spec.parameters import check_params, param_shapes

__all__ = ["load_params", "save_params"]

_FORMAT = 1
# One key, since safetensors writes several in any order: equal parameters shall give equal files.
_KEY = "nonlocal_core"
_DTYPES = ("F16", "F32", "F64")


def save_params(path: str | os.PathLike[str], params: Mapping[str, Any], spec: NonLocalSpec) -> None:
    """Write parameters and their spec to a file, which `load_params` reads.

    The file is written beside its place and then moved there: at no time is there half a file.

    Args:
        path: the file; one that is there is replaced.
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
        ValueError: if the file is damaged, or was not written by `save_params`.
        OSError: if the file cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        ...     load_params(file.name)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: `path` must name a whole file that `save_params` wrote. Got ...
    """
    place = Path(path)
    # Opened here first, since only Python's own errors tell a missing file from a folder.
    with place.open("rb"):
        pass
    try:
        with safe_open(place, framework="numpy") as file:
            spec = _spec_of(file.metadata() or {})
            arrays = {name: _read(file, name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        check_params(arrays, spec)
    except (SafetensorError, OSError, RecursionError, TypeError, ValueError) as error:
        message = f"`path` must name a whole file that `save_params` wrote. Got {str(place)!r}: {error}"
        raise ValueError(message) from error
    return {name: arrays[name] for name in param_shapes(spec)}, spec


def _spec_of(metadata: Mapping[str, str]) -> NonLocalSpec:
    """Return the spec from the metadata of a file."""
    content = json.loads(metadata.get(_KEY, "null"))
    if not isinstance(content, dict) or not {"format", "spec"} <= content.keys():
        message = f"it has no format and spec in its metadata under {_KEY!r}."
        raise ValueError(message)
    if content["format"] != _FORMAT:
        message = f"it has format {content['format']!r}, and this version reads format {_FORMAT}."
        raise ValueError(message)
    written = content.get("specification", SPECIFICATION_VERSION)  # which the first files do not tell
    parts = re.fullmatch(r"(\d{1,9})\.\d{1,9}", str(written))
    if parts is None or int(parts[1]) > int(SPECIFICATION_VERSION.partition(".")[0]):
        message = f"it is of specification {written!r}, and this version computes {SPECIFICATION_VERSION}."
        raise ValueError(message)
    return NonLocalSpec.from_json(json.dumps(content["spec"]))


def _read(file: Any, name: str) -> np.ndarray[Any, Any]:
    """Return one array of a file, if it has a dtype that `save_params` writes."""
    dtype = file.get_slice(name).get_dtype()
    if dtype not in _DTYPES:
        message = f"it holds {name!r} in the dtype {dtype}."
        raise ValueError(message)
    return np.array(file.get_tensor(name))
