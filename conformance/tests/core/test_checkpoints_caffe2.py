"""Caffe2's pickles: read as Python 2 and 3 wrote them, and hostile ones refused before anything happens."""

import os
import pickle
import re
import struct
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nonlocal_conformance.memory import peak_resident
from nonlocal_core.files.peers import find_peer_blocks, read_caffe2

fuzz = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)

BLOBS = {
    "nonlocal_conv3_1_theta_w": np.arange(24, dtype=np.float32).reshape(4, 6, 1, 1, 1) / 7,
    "nonlocal_conv3_1_theta_b": np.array([0.0, -1.5, np.inf, 128.0], dtype=np.float32),
    "lr": np.float64(0.1),
    "model_iter": 400000,
    "long": np.arange(200, dtype=np.int64),
    "flags": np.array([True, False]),
}


def text2(text):
    """Return a string as Python 2 pickles one."""
    raw = text if isinstance(text, bytes) else text.encode("latin-1")
    return b"U" + bytes([len(raw)]) + raw if len(raw) < 256 else b"T" + struct.pack("<i", len(raw)) + raw


def int2(number):
    return b"J" + struct.pack("<i", number)


def tuple2(*items):
    return b"(" + b"".join(items) + b"t"


def dtype2(name="f4", order="<"):
    state = tuple2(int2(3), text2(order), b"NNN", int2(-1), int2(-1), int2(0))
    return b"cnumpy\ndtype\n" + text2(name) + int2(0) + int2(1) + b"\x87R" + state + b"b"


def array2(shape, raw, dtype=None, *, version=1):
    """Return an array as NumPy for Python 2 pickles one; `raw` is its content, as a pickle."""
    start = b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n" + tuple2(int2(0)) + text2("b") + b"\x87R"
    dtype = dtype2() if dtype is None else dtype
    return start + tuple2(int2(version), tuple2(*map(int2, shape)), dtype, b"\x89", raw) + b"b"


def dict2(items):
    """Return a dict of pickled values as Python 2 pickles one."""
    return b"}(" + b"".join(text2(name) + value for name, value in items.items()) + b"u"


def file2(content):
    return b"\x80\x02" + content + b"."


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.pkl"


def assert_equal(found, expected):
    assert list(found) == list(expected)
    for name, array in found.items():
        np.testing.assert_array_equal(array, np.asarray(expected[name]), strict=True)


# What is read


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("nest", [lambda b: b, lambda b: {"blobs": b}, lambda b: {"blobs": b, "cfg": "A: [1]"}])
def test_what_python_3_wrote_is_read(path, protocol, nest):
    path.write_bytes(pickle.dumps(nest(BLOBS), protocol=protocol))
    assert_equal(read_caffe2(path), BLOBS)


@pytest.mark.parametrize("nest", [lambda content: content, lambda content: dict2({"blobs": content})])
def test_what_python_2_wrote_is_read(path, nest):
    arrays = {name: BLOBS[name] for name in ("nonlocal_conv3_1_theta_w", "nonlocal_conv3_1_theta_b")}
    arrays["empty"] = np.empty((0, 3), np.float32)
    content = file2(nest(dict2({name: array2(a.shape, text2(a.tobytes())) for name, a in arrays.items()})))
    path.write_bytes(content)
    assert_equal(read_caffe2(path), arrays)
    standard = pickle.loads(content, encoding="latin1")  # noqa: S301 - made here; it shows that it is such a file
    assert_equal(standard.get("blobs", standard), arrays)


def test_a_scalar_that_python_2_wrote_is_read(path):
    scalar = b"cnumpy.core.multiarray\nscalar\n" + dtype2("f8") + text2(struct.pack("<d", 0.25)) + b"\x86R"
    path.write_bytes(file2(dict2({"lr": scalar})))
    assert_equal(read_caffe2(path), {"lr": np.array(0.25)})


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4", ">i8", "|i1", "|u1", "<u2", "<u4", "<u8", "<i2", "<i4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_dtype_of_numbers_and_both_orders_are_read(path, dtype, order):
    array = np.asarray(np.arange(6).reshape(2, 3), dtype=dtype, order=order)
    path.write_bytes(pickle.dumps({"a": array}, protocol=2))
    found = read_caffe2(path)["a"]
    np.testing.assert_array_equal(found, array)
    assert (found.dtype, found.flags.c_contiguous) == (array.dtype.newbyteorder("="), True)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_an_array_without_elements_that_python_3_wrote_is_read(path, protocol):
    blobs = {"empty": np.empty((0, 3), np.float32)}
    path.write_bytes(pickle.dumps(blobs, protocol=protocol))
    assert_equal(read_caffe2(path), blobs)


def test_what_is_read_can_be_written_to(path):
    path.write_bytes(pickle.dumps(BLOBS, protocol=2))
    assert all(array.flags.writeable and array.flags.owndata for array in read_caffe2(path).values())


def test_the_same_object_under_two_names_is_read_twice(path):
    array = np.arange(3.0)
    path.write_bytes(pickle.dumps({"a": array, "b": array}, protocol=2))
    assert_equal(read_caffe2(path), {"a": array, "b": array})


def test_blocks_are_found_in_what_is_read(path):
    names = [f"{layer}_{kind}" for layer in ("theta", "phi", "g", "out") for kind in "wb"]
    path.write_bytes(pickle.dumps({"blobs": {f"nonlocal_conv4_3_{name}": np.ones(2) for name in names}}, protocol=2))
    assert find_peer_blocks(read_caffe2(str(path))) == [("nonlocal_conv4_3", "official_affine")]


# What is refused


def refuses(path, why):
    start = f"`path` must name a whole pickle of arrays by name. Got {str(path)!r}: "
    return pytest.raises(ValueError, match=f"^{re.escape(start)}{why}")


class Reduced:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    "nest", [lambda o: o, lambda o: {"a": o}, lambda o: {"blobs": {"a": o}}, lambda o: {"a": (o,)}]
)
@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (os.system, ("touch {}",)),
        (eval, ("open('{}', 'w')",)),
        (exec, ("open('{}', 'w')",)),
        (open, ("{}", "w")),
        (os.mkdir, ("{}",)),
        (np.load, ("{}",)),
        (np.save, ("{}", np.ones(2))),
        (np.fromfile, ("{}",)),
        (np.memmap, ("{}", "u1", "w+", 0, (8,))),
        (np.testing.assert_equal, (1, 1)),
        (np.array, ([1.0],)),
        (bytearray, (10**12,)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_call_of_anything_is_refused_and_not_made(path, tmp_path, protocol, nest, function, arguments):
    victim = tmp_path / "made"
    filled = [a.replace("{}", str(victim)) if isinstance(a, str) else a for a in arguments]
    path.write_bytes(pickle.dumps(nest(Reduced(function, *filled)), protocol=protocol))
    with refuses(path, r"it holds [\w.]+; only arrays and numbers are read\."):
        read_caffe2(path)
    assert not victim.exists()


@pytest.mark.parametrize(
    "name",
    [
        "os system",
        "posix system",
        "nt system",
        "builtins eval",
        "__builtin__ eval",
        "subprocess Popen",
        "numpy load",
        "numpy ndarray.tofile",
        "numpy.core.multiarray fromfile",
        "numpy.core.multiarray _reconstruct.__globals__",
        "numpy.testing._private.utils runstring",
        "numpy.testing runstring",
        "numpy.f2py compile",
        "numpy.distutils.exec_command exec_command",
        "numpy core.multiarray._reconstruct",
        "numpy.core multiarray._reconstruct",
        "_codecs decode",
        "_codecs lookup",
        "copyreg _reconstructor",
        "collections OrderedDict",
    ],
)
@pytest.mark.parametrize("called", [b"", b")R"], ids=["named", "called"])
def test_a_name_of_anything_is_refused(path, name, called):
    module, function = name.split()
    path.write_bytes(file2(dict2({"a": f"c{module}\n{function}\n".encode() + called})))
    if f"{module}.{function}" == "numpy.core.multiarray._reconstruct":
        why = ".*"
    else:
        why = re.escape(f"it holds {module}.{function}; only arrays and numbers are read.")
    with refuses(path, why):
        read_caffe2(path)


RAW = text2(np.ones(3, np.float32).tobytes())
NUMPY = b"cnumpy\nndarray\n"
DEEP = b")" + b"\x85" * 10**5
LAUGHS = b")" + b"q\x00h\x00\x86" * 200


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (array2((1,), b"]", dtype2("O8", "|")), "it holds the opcode EMPTY_LIST"),
        (array2((1,), text2(bytes(8)), dtype2("O8", "|")), "it holds the dtype 'O8'"),
        (array2((1,), text2(bytes(8)), dtype2("V8", "|")), "it holds the dtype 'V8'"),
        (array2((1,), text2(bytes(8)), dtype2("M8")), "it holds the dtype 'M8'"),
        (array2((1,), text2(bytes(8)), dtype2("f4,f4")), "it holds the dtype 'f4,f4'"),
        (array2((1,), text2(bytes(4)), dtype2("f4", "S")), "it holds the dtype 'f4'"),
        (array2((3,), RAW, NUMPY), "(not enough values|'NoneType' object is not subscriptable)"),
        (array2((3,), RAW, RAW), "it holds a call of a str"),
        (
            array2((3,), RAW, b"cnumpy\ndtype\n" + LAUGHS + b"\x85R" + tuple2(int2(3), RAW, b"N") + b"b"),
            "it holds a dtype",
        ),
        (array2((3,), RAW, b"cnumpy\ndtype\n" + RAW + b"\x85R" + tuple2(int2(3), LAUGHS, b"N") + b"b"), "it holds the"),
        (array2((4,), RAW), "it holds 12 bytes for an array"),
        (array2((2,), RAW), "it holds 12 bytes for an array"),
        (array2((-1,), RAW), "it holds an array without a shape"),
        (array2((-1, -3), RAW), "it holds an array without a shape"),
        (array2((2**31 - 1,) * 20, RAW), "it holds an array without a shape that fits into the file"),
        (array2((2**31 - 1,) * 20 + (0,), text2("")), "it holds an array without a shape that fits into the file"),
        (array2((0,) * 100, text2("")), "it holds an array without a shape that fits into the file"),
        (array2((3,), RAW) + b")b", "it holds a state twice"),
        (array2((3,), int2(3)), "it holds an array without bytes"),
        (array2((3,), b"c__builtin__\nbytes\n" + int2(3) + b"\x85R"), "it holds an array without bytes"),
        (array2((0,), b"c__builtin__\nbytes\n"), "it holds an array without bytes"),
        (b"c__builtin__\nbytes\n)R", "it holds __builtin__.bytes"),
        (array2((3,), b"X\x02\x00\x00\x00\xc4\x80"), "'latin-1' codec can't encode"),
        (array2((3,), b"c_codecs\nencode\n" + int2(3) + int2(4) + b"\x86R"), "it holds an array without bytes"),
        (b"cnumpy.core.multiarray\n_reconstruct\n", "cannot unpack non-iterable NoneType"),
        (b"cnumpy.core.multiarray\nscalar\n", "cannot unpack non-iterable NoneType"),
        (b"c_codecs\nencode\n", "it holds _codecs.encode"),
        (NUMPY, "it holds numpy.ndarray"),
        (NUMPY + b")\x81", "it holds the opcode NEWOBJ"),
        (NUMPY + b")}\x92", "it holds the opcode NEWOBJ_EX"),
        (RAW + b")R", "it holds a call of a str"),
        (b"})R", "it holds a call of a dict"),
        (NUMPY + b")R)R" + b")R" * 3, "it holds numpy.ndarray"),
        (b"}" + RAW + b"b", "it holds a call of a dict"),
        (b"(i__builtin__\neval\n", "it holds the opcode INST"),
        (b"(" + NUMPY + b"o", "it holds the opcode OBJ"),
        (b"Psome id\n", "it holds the opcode PERSID"),
        (b"NQ", "it holds the opcode BINPERSID"),
        (b"\x82\x01", "it holds the opcode EXT1"),
        (b"]", "it holds the opcode EMPTY_LIST"),
        (b"\x8f", "it holds the opcode EMPTY_SET"),
        (b"\x97", "it holds the opcode NEXT_BUFFER"),
        (b"}", "it holds a call of a dict"),
        (RAW, "it holds a call of a str"),
        (b"N", "it holds a call of a NoneType"),
        (DEEP, "it holds a call of a tuple"),
        (b"\x8a\x10" + b"\x7f" * 16, "Python int(eger)? (too large|out of bounds)"),
        (b"}" + int2(3) + RAW + b"s", "it holds a dict whose keys are not strings"),
        (b"}" + LAUGHS + RAW + b"s", "it holds a dict whose keys are not strings"),
        (b"}(" + LAUGHS + RAW + b"u", "it holds a dict whose keys are not strings"),
        (b"}(" + RAW + b"u", "zip"),
        (NUMPY + RAW + RAW + b"s", "it holds a dict whose keys are not strings"),
    ],
)
def test_a_hostile_value_is_refused_at_once(path, value, why):
    path.write_bytes(file2(dict2({"a": value})))
    start = time.perf_counter()
    with refuses(path, why):
        read_caffe2(path)
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (file2(RAW), "it holds a str"),
        (file2(array2((3,), RAW)), "it holds a _Call"),
        (file2(b"}" + b"r\xff\xff\xff\xff"), "$"),
        (file2(b""), "list index out of range"),
        (file2(b"0"), "it holds the opcode POP"),
        (file2(b"u"), "pop from empty list"),
        (file2(b"s"), "list index out of range"),
        (file2(b"R"), "list index out of range"),
        (file2(b"b"), "pop from empty list"),
        (file2(b"h\x07"), "7"),
        (file2(b"\x94"), "list index out of range"),
        (file2(b"}}"), "it holds more than one value, or bytes after its end"),
        (file2(b"}") + b"\0", "it holds more than one value, or bytes after its end"),
        (file2(b"}") * 2, "it holds more than one value, or bytes after its end"),
        (file2(b"}(" + (text2("a") + int2(1)) * 2 + b"u"), "it holds a name twice"),
        (file2(b"}" + (text2("a") + int2(1) + b"s") * 2), "it holds a name twice"),
        (b"", "pickle exhausted before seeing STOP"),
        (b"\x80\x02}", "pickle exhausted before seeing STOP"),
        (b"\x89PNG\r\n", "it holds the opcode PERSID"),
        (b"PK\x03\x04" + bytes(64), "no newline found"),
        (b"\xff", "at position 0, opcode"),
        (b"\x80\x02\x8e" + b"\xff" * 7 + b"\x7f.", "expected"),
        (b"\x80\x02T\xff\xff\xff\x7f.", "expected"),
        (b"\x80\x02T\xff\xff\xff\xff.", "string4 byte count < 0"),
    ],
)
def test_what_is_no_pickle_of_arrays_is_refused(path, content, why):
    path.write_bytes(content)
    if why == "$":
        assert read_caffe2(path) == {}
        return
    with refuses(path, why):
        read_caffe2(path)


LONG = b"\x8a\xff" + b"\x7f" * 255  # an integer of 613 digits


@pytest.mark.parametrize("size", [LONG, int2(1)], ids=["long", "one"])
@pytest.mark.parametrize("count", [65, 400_000])
def test_a_shape_of_many_sizes_is_refused_at_once_in_one_line(path, size, count):
    shape = b"(" + size + b"q\x00" + b"h\x00" * (count - 1) + b"t"
    path.write_bytes(file2(dict2({"a": array2((7,), RAW).replace(tuple2(int2(7)), shape)})))
    start = time.perf_counter()
    with refuses(path, "it holds an array without a shape that fits into the file; only arrays and numbers are read.$"):
        read_caffe2(path)
    assert time.perf_counter() - start < 20


def test_a_message_is_one_line_of_bounded_length(path):
    path.write_bytes(file2(b"cmodule\n" + b"x" * 10**6 + b"\n"))
    with refuses(path, "it holds module.x{900,1000}\\.\\.\\.$"):
        read_caffe2(path)


def named(count, value):
    """Return the inside of a dict with a value under many names."""
    return b"".join(text2(f"n{number}") + value for number in range(count))


def test_an_array_under_many_names_is_made_once(path):
    array = np.arange(2.0**17)
    path.write_bytes(pickle.dumps(dict.fromkeys(map(str, range(3001)), array), protocol=2))
    found, peak = peak_resident(lambda: read_caffe2(path))
    assert (len(found), len(set(map(id, found.values())))) == (3001, 1)
    assert peak < 10 * path.stat().st_size


def test_many_arrays_of_the_same_bytes_are_refused_before_they_are_made(path):
    first = array2((2**18,), text2(bytes(2**20)) + b"q\x00")
    path.write_bytes(file2(b"}(" + text2("n") + first + named(3000, array2((2**18,), b"h\x00")) + b"u"))
    why = "it holds the same bytes in several arrays"

    def refused():
        with refuses(path, why):
            read_caffe2(path)

    _, peak = peak_resident(refused)
    assert peak < 50 * path.stat().st_size


@fuzz
@given(data=st.data())
def test_any_truncation_is_refused(path, data):
    content = pickle.dumps({"blobs": BLOBS}, protocol=data.draw(st.sampled_from([2, 4])))
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with refuses(path, ""):
        read_caffe2(path)


@fuzz
@given(data=st.data())
def test_a_changed_byte_is_refused_or_gives_arrays(path, data):
    content = bytearray(pickle.dumps({"blobs": BLOBS}, protocol=2))
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        found = read_caffe2(path)
    except ValueError as error:
        assert repr(str(path)) in str(error)  # noqa: PT017 - either outcome is right
    else:
        assert all(isinstance(array, np.ndarray) and array.dtype.kind in "biuf" for array in found.values())


@fuzz
@given(content=st.binary(max_size=200))
def test_any_other_bytes_are_refused_or_give_no_arrays(path, content):
    path.write_bytes(b"\x80\x02" + content)
    try:
        assert all(array.size == 1 for array in read_caffe2(path).values())
    except ValueError as error:
        assert repr(str(path)) in str(error)  # noqa: PT017 - either outcome is right


@pytest.mark.parametrize(("protocol", "opcode"), [(0, "DICT"), (1, "INT")])
def test_an_older_protocol_is_named(path, protocol, opcode):
    path.write_bytes(pickle.dumps({"a": np.ones(2)}, protocol=protocol))
    with refuses(path, f"it holds the opcode {opcode}, as of protocol 0 or 1, where 2 or later is needed; only"):
        read_caffe2(path)


def test_the_protocol_is_not_blamed_where_it_serves(path):
    path.write_bytes(pickle.dumps([1.0], protocol=2))
    with refuses(path, "it holds the opcode EMPTY_LIST; only"):
        read_caffe2(path)


def test_a_missing_file_is_named(path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
        read_caffe2(path)
