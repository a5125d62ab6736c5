"""Caffe2's pickles, read without executing anything: the opcodes are followed here, and arrays are data."""

from __future__ import annotations

import dataclasses
import math
import os
import pickletools
from typing import Any, NoReturn

import numpy as np

from nonlocal_core.errors import shortened
from nonlocal_core.files.regular import read_file

__all__ = ["read_caffe2"]

_ARRAYS = {"numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"}
_SCALARS = {"numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"}
_ADMITTED = {*_ARRAYS, *_SCALARS, "numpy.ndarray", "numpy.dtype", "_codecs.encode", "__builtin__.bytes"}
# Tuples, not sets: the hash of what a file holds may never end.
_DTYPES = ("b1", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_INTEGERS = {"BININT", "BININT1", "BININT2", "LONG1"}
_TEXTS = {"SHORT_BINSTRING", "BINSTRING", "SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"}
_AXES = 64
"""How many axes an array of NumPy has at most."""
_LITERALS = {*_INTEGERS, *_TEXTS, "BINFLOAT"}


@dataclasses.dataclass(eq=False)
class _Call:
    """What a file asks to be called; it never is."""

    function: str
    arguments: Any = None
    state: Any = None


def read_caffe2(path: str | os.PathLike[str]) -> dict[str, np.ndarray[Any, Any]]:
    """Read the blobs of a Caffe2 pickle, as video-nonlocal-net and Detectron write it, without executing anything.

    Python's own `pickle.load` calls whatever a file names. Here NumPy arrays of numbers are made from the bytes in the
    file, and a file that asks for anything else is refused.

    Args:
        path: the pickle, of protocol 2 or later, from Python 2 or 3: a dict of blobs, or one that has it under "blobs".

    Returns:
        From the names of the blobs to arrays; a number is an array without axes.

    Raises:
        TypeError: if `path` is no path.
        ValueError: if the file is damaged, holds anything but arrays and numbers by name, or is no regular file.
        OSError: if the file cannot be read.

    Example:
        >>> import pickle, tempfile
        >>> with tempfile.NamedTemporaryFile(suffix=".pkl") as file:
        ...     pickle.dump({"blobs": {"nonlocal_conv3_1_g_b": np.arange(3.0)}}, file, protocol=2)
        ...     file.flush()
        ...     read_caffe2(file.name)
        {'nonlocal_conv3_1_g_b': array([0., 1., 2.])}
    """
    content = read_file(path)
    try:
        blobs = _follow(content)
        if isinstance(blobs, dict) and isinstance(blobs.get("blobs"), dict):
            blobs = blobs["blobs"]
        if not isinstance(blobs, dict):
            _refuse(f"a {type(blobs).__name__}")
        return _arrays(blobs, len(content))
    # What a damaged file makes of the stack, of a shape, or of a size.
    except (ValueError, TypeError, LookupError, OverflowError, MemoryError) as error:
        rule = "name a whole pickle of arrays by name"
        message = f"`path` must {rule}. Got {os.fspath(path)!r}: {shortened(str(error))}"
        raise ValueError(message) from error


def _refuse(what: str) -> NoReturn:
    message = f"it holds {what}; only arrays and numbers are read."
    raise ValueError(message)


def _follow(content: bytes) -> Any:  # noqa: C901, PLR0912 - a case for each opcode
    """Return what a pickle describes, in which every call is a `_Call`."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    argument: Any
    for opcode, argument, position in pickletools.genops(content):
        match opcode.name:
            case "STOP" if len(stack) > 1 or position != len(content) - 1:
                _refuse("more than one value, or bytes after its end")
            case "PROTO" | "FRAME" | "STOP":
                pass
            case name if name in _LITERALS:
                stack.append(argument)
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case "EMPTY_DICT":
                stack.append({})
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                start = marks.pop()
                stack[start:] = [tuple(stack[start:])]
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                start = len(stack) - int(opcode.name[-1])
                stack[start:] = [tuple(stack[start:])]
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_named(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                stack[-2:] = [_named(".".join(stack[-2:]))]
            case "REDUCE":
                stack[-2:] = [dataclasses.replace(_call(stack[-2]), arguments=stack[-1])]
            case "BUILD":
                state = stack.pop()
                _build(_call(stack[-1]), state)
            case "SETITEM":
                _put(stack[-3], stack[-2:])
                del stack[-2:]
            case "SETITEMS":
                start = marks.pop()
                _put(stack[start - 1], stack[start:])
                del stack[start:]
            case name:
                old = "" if content.startswith(b"\x80") else ", as of protocol 0 or 1, where 2 or later is needed"
                _refuse(f"the opcode {name}{old}")
    return stack[-1]


def _named(function: str) -> _Call:
    """Return a call of one of the functions that make an array."""
    if function not in _ADMITTED:
        _refuse(function)
    return _Call(function)


def _call(value: Any) -> _Call:
    if not isinstance(value, _Call):
        _refuse(f"a call of a {type(value).__name__}")
    return value


def _build(call: _Call, state: Any) -> None:
    """Give a call its state."""
    if call.state is not None:
        _refuse("a state twice")
    call.state = state


def _put(blobs: Any, items: list[Any]) -> None:
    """Put names and values, in turn, into a dict; a name is a string, since the hash of anything else may never end."""
    names, values = items[::2], items[1::2]
    if not isinstance(blobs, dict) or not all(isinstance(name, str) for name in names):
        _refuse("a dict whose keys are not strings")
    before = len(blobs)
    blobs.update(zip(names, values, strict=True))
    if len(blobs) < before + len(names):
        _refuse("a name twice")


def _arrays(blobs: dict[str, Any], most: int) -> dict[str, np.ndarray[Any, Any]]:
    """Return the arrays that a pickle of `most` bytes describes; one under several names is made once."""
    calls = {id(blob): blob for blob in blobs.values() if isinstance(blob, _Call)}
    made: dict[int, np.ndarray[Any, Any]] = {}
    room = most
    for key, call in calls.items():
        made[key] = _array(call, most)
        room -= made[key].nbytes
        if room < 0:
            _refuse("the same bytes in several arrays")
    return {name: made[id(blob)] if id(blob) in made else _number(blob) for name, blob in blobs.items()}


def _number(value: Any) -> np.ndarray[Any, Any]:
    """Return a number of a pickle as an array without axes."""
    if not isinstance(value, int | float):
        _refuse(f"a call of a {type(value).__name__}")
    return np.asarray(value, dtype=np.float64 if isinstance(value, float) else np.int64)


def _array(call: _Call, most: int) -> np.ndarray[Any, Any]:
    """Return the array that a pickle of `most` bytes describes."""
    if call.function in _ARRAYS:
        _, shape, dtype, by_columns, content = call.state
    elif call.function in _SCALARS:
        shape, by_columns, (dtype, content) = (), False, call.arguments
    else:
        _refuse(call.function)
    kind, raw = _dtype(dtype), _bytes(content)
    # Each size is small before they are multiplied or shown: a file may name one long number again and again.
    fits = isinstance(shape, tuple) and len(shape) <= _AXES
    if not fits or not all(isinstance(size, int) and 0 <= size <= most for size in shape):
        _refuse("an array without a shape that fits into the file")
    if math.prod(shape) * kind.itemsize != len(raw):
        _refuse(f"{len(raw)} bytes for an array of shape {shape} and dtype {kind}")
    found = np.ndarray(shape, kind, raw, order="F" if by_columns else "C")
    return np.array(found, dtype=kind.newbyteorder("="), order="C")


def _dtype(value: Any) -> np.dtype[Any]:
    """Return the dtype that a pickle describes: one of plain numbers."""
    call = _call(value)
    name, (_, order, *_) = call.arguments[0], call.state
    if call.function != "numpy.dtype" or name not in _DTYPES or order not in ("<", ">", "|"):
        _refuse(f"the dtype {name!r}" if isinstance(name, str) else "a dtype of another kind")
    return np.dtype(name).newbyteorder(order)


def _bytes(value: Any) -> bytes:
    """Return the bytes of an array: Python 2 wrote them as a string, Python 3 may have written their encoding."""
    if isinstance(value, _Call) and value.function == "__builtin__.bytes" and value.arguments == ():
        return b""  # Python 3's, in protocol 2
    if isinstance(value, _Call) and value.function == "_codecs.encode":
        value, _ = value.arguments
    if isinstance(value, str):
        value = value.encode("latin-1")
    if not isinstance(value, bytes):
        _refuse("an array without bytes")
    return value
