"""Weight files: what is written is read back, and anything else is refused whole."""

import json
import os
import pathlib
import re
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from nonlocal_conformance.memory import peak_resident
from nonlocal_core import SPECIFICATION_VERSION, NonLocalSpec, init_params, param_shapes
from nonlocal_core.files import parameters
from nonlocal_core.files.parameters import load_params, save_params
from nonlocal_core.files.peers import read_caffe2

SPECS = [
    NonLocalSpec(channels=5),
    NonLocalSpec(channels=1, pairwise="gaussian", bias=False),
    NonLocalSpec(channels=6, pairwise="concatenation", bias={"concat": True}, norm="batch"),
    NonLocalSpec(channels=4, pairwise="dot_product", scale=-0.1, subsample=(1, 2, 2), norm="affine"),
    NonLocalSpec(channels=4, axes="time", subsample_at="input", norm_epsilon=1.0000001e-5, residual=False),
    NonLocalSpec(channels=4, group_size=2, inner_channels=7, zero_init=False),
]
SPEC = SPECS[2]

# The function's scratch folder is shared by all the examples: each one writes the same file anew.
fuzz = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def filled(spec, dtype="float64", seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in param_shapes(spec).items()}


def contents(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "block.safetensors"


@pytest.fixture
def saved(path):
    save_params(path, filled(SPEC), SPEC)
    return path


def raw(metadata, tensors=None, data=b""):
    """Return a safetensors file with this header."""
    header = json.dumps({"__metadata__": metadata, **(tensors or {})}).encode()
    return struct.pack("<Q", len(header)) + header + data


def metadata_of(path):
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length])["__metadata__"]


# Round trips


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_what_is_saved_is_loaded(path, spec, dtype):
    params = filled(spec, dtype)
    save_params(path, params, spec)
    loaded, loaded_spec = load_params(path)
    assert loaded_spec == spec
    assert list(loaded) == list(param_shapes(spec))
    for name, array in params.items():
        np.testing.assert_array_equal(loaded[name], array, strict=True)


def test_each_parameter_keeps_its_own_dtype(path):
    params = filled(SPEC) | {"g.weight": np.ones((3, 6), "float16"), "concat.bias": np.float32(2)}
    save_params(path, params, SPEC)
    loaded, _ = load_params(path)
    assert {name: a.dtype.name for name, a in loaded.items() if a.dtype != "float64"} == {
        "g.weight": "float16",
        "concat.bias": "float32",
    }


def test_values_are_kept_to_the_bit(path):
    params = filled(SPEC)
    params["out.bias"] = np.array([np.nan, np.inf, -np.inf, -0.0, 5e-324, np.finfo(float).max])
    save_params(path, params, SPEC)
    assert load_params(path)[0]["out.bias"].tobytes() == params["out.bias"].tobytes()


@pytest.mark.parametrize(
    "arrange",
    [
        np.asfortranarray,
        lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
        lambda a: a[..., ::-1].copy()[..., ::-1],
        lambda a: np.stack([a, a + 1], axis=-1)[..., 0],
        lambda a: a.astype(a.dtype.newbyteorder(">")),
        lambda a: a.astype(a.dtype.newbyteorder(">")).T.copy().T,
        lambda a: a.tolist(),
    ],
    ids=["columns first", "every second", "backwards", "slice", "big-endian", "big-endian columns", "list"],
)
def test_the_arrangement_of_the_memory_does_not_matter(path, arrange):
    params = filled(SPEC)
    odd = {name: arrange(a) if a.ndim else a for name, a in params.items()}
    save_params(path, odd, SPEC)
    for name, array in load_params(path)[0].items():
        np.testing.assert_array_equal(array, params[name], strict=True)


def test_broadcast_and_read_only_arrays_are_written(path):
    params = filled(SPEC) | {"g.weight": np.broadcast_to(np.arange(6.0), (3, 6))}
    save_params(path, params, SPEC)
    np.testing.assert_array_equal(load_params(path)[0]["g.weight"], [range(6)] * 3)


def test_what_is_loaded_can_be_written_to(saved):
    loaded, _ = load_params(saved)
    loaded["out.bias"] += 1
    assert all(array.flags.writeable for array in loaded.values())
    np.testing.assert_array_equal(loaded["out.bias"], filled(SPEC)["out.bias"] + 1)


def test_saving_leaves_the_parameters_as_they_are(path):
    params = filled(SPEC)
    save_params(path, params, SPEC)
    assert list(params) == list(param_shapes(SPEC))
    assert all(np.array_equal(params[name], a) for name, a in filled(SPEC).items())


def test_equal_parameters_give_equal_files(tmp_path):
    params = filled(SPEC)
    save_params(tmp_path / "one", params, SPEC)
    save_params(tmp_path / "other", dict(reversed(params.items())), SPEC)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


@pytest.mark.parametrize("kind", [str, pathlib.PurePath, os.fspath], ids=["str", "PurePath", "fspath"])
def test_a_path_may_be_text_or_an_object(path, kind):
    save_params(kind(path), filled(SPEC), SPEC)
    assert load_params(kind(path))[1] == SPEC


def test_a_relative_path_and_an_odd_name_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_params("ä 1 [x].bin", filled(SPEC), SPEC)
    assert load_params("ä 1 [x].bin")[1] == SPEC
    assert contents(tmp_path) == ["ä 1 [x].bin"]


# Writing


def test_only_the_file_itself_is_left(saved):
    assert contents(saved.parent) == [saved.name]


def test_an_old_file_is_replaced(saved):
    save_params(saved, filled(SPECS[0], seed=1), SPECS[0])
    loaded, spec = load_params(saved)
    assert spec == SPECS[0]
    assert np.array_equal(loaded["g.bias"], filled(SPECS[0], seed=1)["g.bias"])


def test_a_new_file_may_be_read_by_those_whom_the_umask_admits(path):
    path.with_name("plain").write_bytes(b"")
    save_params(path, filled(SPEC), SPEC)
    assert path.stat().st_mode == path.with_name("plain").stat().st_mode


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755])
def test_the_permissions_of_a_file_stay_and_no_one_may_read_it_meanwhile(saved, monkeypatch, mode):
    saved.chmod(mode)
    seen = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (seen.append(os.fstat(number).st_mode & 0o777), fsync(number)))
    save_params(saved, filled(SPECS[0]), SPECS[0])
    assert (seen, saved.stat().st_mode & 0o777) == ([0o600], mode)
    assert load_params(saved)[1] == SPECS[0]


def test_what_is_no_file_is_not_replaced(path):
    os.mkfifo(path)
    with pytest.raises(FileExistsError, match=re.escape(f"Not a regular file: {str(path)!r}")):
        save_params(path, filled(SPEC), SPEC)
    assert (path.is_fifo(), contents(path.parent)) == (True, [path.name])


def test_what_a_killed_process_left_long_ago_is_taken_away(saved):
    old, new, other = (saved.with_name(name) for name in (".nonlocal-1.tmp", ".nonlocal-2.tmp", "nonlocal.tmp"))
    for left in (old, new, other):
        left.touch()
    os.utime(old, (1, 1))
    os.utime(other, (1, 1))
    save_params(saved, filled(SPEC), SPEC)
    assert contents(saved.parent) == sorted([saved.name, new.name, other.name])


def test_a_link_stays_a_link_to_the_new_file(saved):
    link = saved.with_name("latest")
    link.symlink_to(saved.name)
    save_params(link, filled(SPECS[0]), SPECS[0])
    assert link.is_symlink()
    assert load_params(saved)[1] == SPECS[0]


@pytest.mark.parametrize(("place", "step"), [(os, "fsync"), (pathlib.Path, "chmod"), (pathlib.Path, "replace")])
def test_a_failure_leaves_the_old_file_and_nothing_else(saved, monkeypatch, place, step):
    before = saved.read_bytes()

    def fail(*_):
        message = "disk full"
        raise OSError(message)

    monkeypatch.setattr(place, step, fail)
    with pytest.raises(OSError, match="disk full"):
        save_params(saved, filled(SPECS[0]), SPECS[0])
    monkeypatch.undo()
    assert (saved.read_bytes(), contents(saved.parent)) == (before, [saved.name])


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "none"))):
        save_params(tmp_path / "none" / "block", filled(SPEC), SPEC)


def test_a_folder_cannot_be_written_over(tmp_path):
    (tmp_path / "sub").mkdir()
    with pytest.raises(IsADirectoryError, match=re.escape(repr(str(tmp_path / "sub")))):
        save_params(tmp_path / "sub", filled(SPEC), SPEC)
    assert contents(tmp_path) == ["sub"]


WITHOUT = {name: a for name, a in filled(SPEC).items() if name != "g.bias"}
DTYPES = "be an array of float16, float32, float64, bfloat16"


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (WITHOUT, r"^`params` must hold exactly .* Got missing \['g\.bias'\], unknown \[\]\.$"),
        ({}, r"^`params` must hold exactly .* Got missing \['concat\.bias', .*\], unknown \[\]\.$"),
        (
            filled(SPEC) | {"extra": np.ones(2)},
            r"^`params` must hold exactly .* missing \[\], unknown \['extra'\]\.$",
        ),
        (
            filled(SPEC) | {3: np.ones(2), "extra": np.ones(2)},
            r"^`params` must hold exactly .* missing \[\], unknown \[3, 'extra'\]\.$",
        ),
        (
            filled(SPEC) | {"g.bias": np.ones((3, 1))},
            r"^`params\['g\.bias'\]` must have shape \(3,\)\. Got shape \(3, 1\)\.$",
        ),
        (
            filled(SPEC) | {"concat.bias": np.ones(1)},
            r"^`params\['concat\.bias'\]` must have shape \(\)\. Got shape \(1,\)\.$",
        ),
    ],
)
def test_wrong_parameters_are_a_value_error_and_nothing_is_written(path, params, message):
    with pytest.raises(ValueError, match=message):
        save_params(path, params, SPEC)
    assert contents(path.parent) == []


class Unreadable:
    shape = (3,)

    def __array__(self, dtype=None, copy=None):
        message = "on another device"
        raise RuntimeError(message)


@pytest.mark.parametrize(
    ("array", "got"),
    [
        (np.ones(3, int), "dtype int64"),
        ([1, 2, 3], "dtype int64"),
        (np.ones(3, bool), "dtype bool"),
        (np.ones(3, complex), "dtype complex128"),
        (np.ones(3, np.longdouble), f"dtype {np.dtype(np.longdouble)}"),
        (np.array(["a", "b", "c"]), "dtype <U1"),
        (np.array([None] * 3), "dtype object"),
        (None, "dtype object"),
        ([1.0, [2.0], 3.0], "[1.0, [2.0], 3.0] of type list"),
    ],
)
def test_what_is_not_a_floating_point_array_is_a_type_error_and_nothing_is_written(path, array, got):
    message = f"`params['g.bias']` must {DTYPES}. Got {got}."
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        save_params(path, filled(SPEC) | {"g.bias": array}, SPEC)
    assert contents(path.parent) == []


def test_an_array_that_numpy_cannot_read_is_named(path):
    message = rf"^`params\['g\.bias'\]` must {DTYPES}\. Got shape \(3,\) of type Unreadable\.$"
    with pytest.raises(TypeError, match=message):
        save_params(path, filled(SPEC) | {"g.bias": Unreadable()}, SPEC)


@pytest.mark.parametrize("params", [None, [1.0], "theta.weight"])
def test_parameters_must_be_a_mapping(path, params):
    with pytest.raises(TypeError, match=r"^`params` must be a mapping from names to arrays\. Got "):
        save_params(path, params, SPEC)


@pytest.mark.parametrize("spec", [None, SPEC.to_json(), NonLocalSpec])
def test_the_spec_must_be_a_spec(path, spec):
    with pytest.raises(TypeError, match=r"^`spec` must be a NonLocalSpec\. Got "):
        save_params(path, filled(SPEC), spec)


def test_a_function_cannot_be_saved(path):
    spec = NonLocalSpec(channels=4, pairwise=max, normalize="count")
    with pytest.raises(ValueError, match=r"^`pairwise` must be one of the named forms to be written as JSON\. Got"):
        save_params(path, filled(spec), spec)
    assert contents(path.parent) == []


# Paths


class Place:
    """A path whose text is bytes."""

    def __fspath__(self):
        return b"block"


def save_to(path):
    save_params(path, filled(SPEC), SPEC)


CALLS = [pytest.param(call, id=call.__name__) for call in (load_params, read_caffe2, save_to)]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("path", [None, b"block", 3, True, Place()], ids=["None", "bytes", "int", "bool", "object"])
def test_a_path_that_is_none_is_refused_by_name(call, path):
    with pytest.raises(TypeError, match=r"^`path` must be a string or a path\. Got "):
        call(path)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("path", ["a\0b", "\ud800", pathlib.Path("a\0b")])
def test_a_name_that_the_system_cannot_hold_is_refused_by_name(call, path):
    with pytest.raises(ValueError, match=r"^`path` must be a name that the system can hold\. Got '"):
        call(path)


@pytest.mark.parametrize("call", CALLS[:2])
@pytest.mark.parametrize("path", ["pipe", "/dev/zero", "/dev/null"])
def test_a_pipe_and_a_device_are_no_files(call, path, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=rf"^`path` must name a regular file\. Got '.*{path}'\.$"):
        call(tmp_path / path)


def announcing(spec, tensors):
    """Return the header of a file for a spec, with these arrays beside one another."""
    start, entries = 0, {}
    for name, (dtype, shape, size) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + size]}
        start += size
    content = {"format": 1, "spec": json.loads(spec.to_json())}
    return raw({"nonlocal_core": json.dumps(content)}, entries)


HUGE = NonLocalSpec(channels=2**20, pairwise="gaussian", bias=False)
SMALL = NonLocalSpec(channels=4, pairwise="gaussian", bias=False)
TERABYTES = dict.fromkeys(param_shapes(HUGE), ("F64", (2**19, 2**20), 2**42))


@pytest.mark.parametrize(
    ("start", "call", "why"),
    [
        (b"\x80\x02", read_caffe2, "`path` must name a file that fits into memory. Got "),
        (
            announcing(HUGE, TERABYTES | {"out.weight": ("F64", (2**20, 2**19), 2**42)}),
            load_params,
            "`path` must name a file that fits into memory. Got ",
        ),
        (announcing(SMALL, TERABYTES), load_params, "`params['g.weight']` must have shape (2, 4). Got shape "),
        (
            announcing(SMALL, {"g.weight": ("F64", (2, 4), 64), "out.weight": ("F64", (4, 2), 64)}),
            load_params,
            "bytes of these parameters.",
        ),
    ],
    ids=["pickle", "whole", "other shapes", "more than the header says"],
)
def test_a_file_of_terabytes_is_refused_at_once(path, start, call, why):
    path.write_bytes(start)
    os.truncate(path, len(start) + 2**43)

    def refused():
        with pytest.raises(ValueError, match=re.escape(why)):
            call(path)

    _, peak = peak_resident(refused)
    assert peak < 2**26


def test_a_file_that_is_cut_off_while_it_is_read_is_refused(path, monkeypatch):
    spec = NonLocalSpec(channels=2**10)  # more than Python reads ahead
    save_params(path, filled(spec, "float16"), spec)
    read = parameters.read_exactly

    def cut_off(file, size):
        os.truncate(path, 2**20)
        return read(file, size)

    monkeypatch.setattr(parameters, "read_exactly", cut_off)
    with refuses(path, "Error while deserializing"):
        load_params(path)


# Reading


def refuses(path, why):
    """Expect the error that names the file and says why."""
    start = f"`path` must name a whole file that `save_params` wrote. Got {str(path)!r}: "
    return pytest.raises(ValueError, match=f"^{re.escape(start)}{why}")


def test_a_missing_file_is_named(path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
        load_params(path)


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))):
        load_params(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x",
        b"\x80\x04}.",
        b"\x89PNG\r\n\x1a\n" + bytes(64),
        b"PK\x03\x04" + bytes(64),
        b"{}" * 50,
        bytes(8),
    ],
)
def test_a_file_of_another_kind_is_refused(path, content):
    path.write_bytes(content)
    with refuses(path, "it has no header of safetensors: "):
        load_params(path)


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"format": "pt"},
        {"nonlocal_core": "null"},
        {"nonlocal_core": '["format", "spec"]'},
        {"nonlocal_core": '{"format": 1}'},
        {"nonlocal_core": SPEC.to_json()},
    ],
)
def test_a_file_of_another_program_is_refused(path, metadata):
    path.write_bytes(raw(metadata))
    with refuses(path, re.escape("it has no format and spec in its metadata under 'nonlocal_core'.")):
        load_params(path)


def test_a_file_without_any_metadata_is_refused(path):
    header = b"{}"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with refuses(path, re.escape("it has no format and spec in its metadata under 'nonlocal_core'.")):
        load_params(path)


@pytest.mark.parametrize("text", ["", "{", "[" * 10**5, "1" * 5000], ids=["empty", "half", "deep", "long"])
def test_metadata_that_are_not_json_are_refused(path, text):
    path.write_bytes(raw({"nonlocal_core": text}))
    with refuses(path, ""):
        load_params(path)


@pytest.mark.parametrize(
    "twice",
    [
        ('{"__metadata__"', '{"g.bias": {}, "g.bias": {}, "__metadata__"'),
        (r"\"channels\"", r"\"channels\": 3, \"channels\""),
        (r"\"format\"", r"\"format\": 3, \"format\""),
    ],
    ids=["array", "option", "format"],
)
def test_what_stands_twice_in_a_header_is_refused(saved, twice):
    content = saved.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].decode()
    assert twice[0] in header
    header = header.replace(*twice).encode()
    saved.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
    with refuses(saved, r".*The key '\w+(\.bias)?' stands twice in one object"):
        load_params(saved)


def test_a_long_header_is_refused_unread(path):
    path.write_bytes(struct.pack("<Q", 2**20 + 1) + b" " * (2**20 + 1))
    with refuses(path, "it has no header of safetensors: 1048577 bytes, where 1048576 are the most"):
        load_params(path)


@pytest.mark.parametrize("version", [2, 0, "1", None, [1]])
def test_another_format_is_refused(path, version):
    path.write_bytes(raw({"nonlocal_core": json.dumps({"format": version, "spec": {"channels": 6}})}))
    with refuses(path, re.escape(f"it has format {version!r}, and this version reads format 1.")):
        load_params(path)


def with_specification(path, **written):
    """Write the file of `SPEC` as if for another version of the specification."""
    content = {"format": 1, **written, "spec": json.loads(SPEC.to_json())}
    path.write_bytes(save(filled(SPEC), {"nonlocal_core": json.dumps(content)}))


@pytest.mark.parametrize("written", [{}, {"specification": "2.0"}, {"specification": "2.7"}, {"specification": "1.0"}])
def test_files_of_this_specification_and_of_earlier_ones_are_read(path, written):
    with_specification(path, **written)
    assert load_params(path)[1] == SPEC


@pytest.mark.parametrize("version", ["3.0", "10.0", "2", 1, None, "", "one", "9" * 50])
def test_a_file_of_no_specification_or_of_a_later_one_is_refused(path, version):
    with_specification(path, specification=version)
    with refuses(path, re.escape(f"it is of specification {version!r}, and this version computes 2.0.")):
        load_params(path)


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("null", "`text` must be a JSON object. Got null"),
        ("{}", "`text` must have 'channels'"),
        ('{"channels": 6, "heads": 2}', "`text` must have 'channels' and no options beside"),
        ('{"channels": true}', "`channels` must be a positive int. Got True of type bool"),
        ('{"channels": 1e999}', "`channels` must be a positive int. Got inf of type float"),
        ('{"channels": 6, "scale": 0}', "`scale` must be None"),
        ('{"channels": 6}', "`params` must hold exactly"),
        (SPEC.to_json().replace("6", "600"), "`params\\['theta.weight'\\]` must have shape \\(3, 600\\)"),
        (SPEC.to_json().replace("6", "9" * 30), "`params\\['theta.weight'\\]` must have shape"),
    ],
    ids=[
        "null",
        "no options",
        "unknown",
        "bool",
        "infinite",
        "zero",
        "form",
        "shape",
        "huge",
    ],
)
def test_a_wrong_spec_is_refused(saved, spec, why):
    content = saved.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = {"nonlocal_core": f'{{"format": 1, "spec": {spec}}}'}
    saved.write_bytes(raw(header.pop("__metadata__"), header, content[8 + length :]))
    with refuses(saved, why):
        load_params(saved)


def tensor(dtype, shape, size):
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}


@pytest.mark.parametrize(
    ("name", "entry", "why"),
    [
        ("extra", tensor("F32", [1], 4), "`params` must hold exactly .* unknown \\['extra'\\]"),
        ("theta.weight", tensor("I32", [1], 4), "it holds 'theta.weight' in the dtype I32."),
        ("theta.weight", tensor("BF16", [2], 4), "it holds 'theta.weight' in the dtype BF16."),
        ("theta.weight", tensor("F8_E4M3", [4], 4), "it holds 'theta.weight' in the dtype F8_E4M3."),
        ("theta.weight", tensor("F31", [1], 4), "it holds 'theta.weight' in the dtype F31."),
        ("theta.weight", tensor("F32", [-1], 4), ""),
        ("theta.weight", tensor("F32", [2**40, 2**40], 4), ""),
    ],
)
def test_a_wrong_array_is_refused(saved, name, entry, why):
    saved.write_bytes(raw(metadata_of(saved), {name: entry}, bytes(4)))
    with refuses(saved, why):
        load_params(saved)


@pytest.mark.parametrize("shape", [[0, 2**62, 2**62], [0, 2**64 - 1], [2**64 - 1, 0]])
def test_an_empty_array_of_an_impossible_shape_is_refused(saved, shape):
    saved.write_bytes(raw(metadata_of(saved), {"theta.weight": tensor("F32", shape, 0)}))
    with refuses(saved, ""):
        load_params(saved)


@fuzz
@given(content=st.binary(max_size=300))
def test_any_other_bytes_are_refused(tmp_path, content):
    path = tmp_path / "fuzz"
    path.write_bytes(content)
    with refuses(path, ""):
        load_params(path)


@fuzz
@given(data=st.data())
def test_any_truncation_and_any_addition_is_refused(saved, data):
    content = saved.read_bytes()
    path = saved.with_name("fuzz")
    length = data.draw(st.integers(0, len(content) - 1))
    path.write_bytes(data.draw(st.sampled_from([content[:length], content + content[: length + 1]])))
    with refuses(path, ""):
        load_params(path)


@fuzz
@given(data=st.data())
def test_a_changed_byte_is_refused_or_gives_a_whole_block(saved, data):
    content = bytearray(saved.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    at = data.draw(st.integers(0, 8 + length - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    path = saved.with_name("fuzz")
    path.write_bytes(content)
    try:
        params, spec = load_params(path)
    except ValueError as error:
        assert repr(str(path)) in str(error)  # noqa: PT017 - either outcome is right
    else:
        assert {name: a.shape for name, a in params.items()} == param_shapes(spec)


def test_the_metadata_are_the_format_the_specification_and_the_spec(saved):
    (text,) = metadata_of(saved).values()
    expected = {"format": 1, "specification": SPECIFICATION_VERSION, "spec": json.loads(SPEC.to_json())}
    assert json.loads(text) == expected


def test_a_new_block_survives_the_round_trip(path):
    params = init_params(SPEC, np.random.default_rng(3))
    save_params(path, params, SPEC)
    assert all(np.array_equal(a, params[name]) for name, a in load_params(path)[0].items())
