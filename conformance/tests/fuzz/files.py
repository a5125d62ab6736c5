"""Changed files, read by every reader: `python conformance/tests/fuzz/files.py 10000` reads so many with each.

A count such as 600s is one of seconds for each reader. A file is made from its number alone, so that `weights:123` in
place of the count reads one of them again.
"""

import argparse
import ast
import collections
import dataclasses
import faulthandler
import functools
import io
import itertools
import json
import pickle
import random
import re
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from amounts import amount
from PIL import Image

import nonlocal_core as nlc
from nonlocal_bench.results import Run, load
from nonlocal_conformance.memory import peak_resident
from nonlocal_core.commands.demo import picture
from nonlocal_core.files.peers.arrays import shape_in_file
from nonlocal_core.files.peers.layouts import GAN, LAYOUTS
from nonlocal_core.spec.presets import PRESETS

SPECS = [
    nlc.NonLocalSpec(channels=6, pairwise="concatenation", bias={"concat": True}, norm="batch"),
    nlc.NonLocalSpec(channels=4, pairwise="dot_product", scale=-0.1, subsample=(1, 2, 2), norm="affine"),
    nlc.NonLocalSpec(channels=1, pairwise="gaussian", bias=False, axes=(0, 2)),
]
PIXELS = 2**20
SECONDS = 2
"""How long a file may take, beside a tenth of a millisecond for each byte."""
HANG = 60
"""After how many seconds a file is said never to end."""


@dataclasses.dataclass(frozen=True)
class Reader:
    """One reader of files, and what is promised of it.

    Args:
        read: reads a path.
        seeds: makes whole files, which are changed.
        holds: whether what was read is whole.
        factor: the bytes of memory for each byte of the file.
        base: the bytes of memory beside.
        errors: what it raises for a file that is not whole.
    """

    read: Callable
    seeds: Callable
    holds: Callable
    factor: int
    base: int = 2**26
    errors: type | tuple = ValueError


def weights():
    """Return weight files."""
    with tempfile.TemporaryDirectory() as folder:
        for spec in SPECS:
            params = nlc.init_params(spec, np.random.default_rng(0))
            nlc.save_params(f"{folder}/block", params, spec)
            yield Path(folder, "block").read_bytes()


def pickles():
    """Return Caffe2's pickles."""
    blobs = {"g_w": np.ones((2, 4, 1, 1, 1), "f4"), "lr": np.float64(0.1), "long": np.arange(200), "model_iter": 4}
    blobs["same"] = blobs["long"]
    return [pickle.dumps(nest, protocol=protocol) for protocol in (2, 4) for nest in (blobs, {"blobs": blobs})]


def state_dicts():
    """Return the keys and shapes of a block of each implementation as JSON."""
    for peer, layout in LAYOUTS.items():
        rank = PRESETS[peer].ranks[-1]
        spec = nlc.NonLocalSpec.preset(peer, channels=4, rank=rank)
        variant = {"pooled": bool(layout.pooled) and spec.subsample is not None, "normed": spec.norm is not None}
        keys, twins = layout.keys(**variant), layout.second_keys(**variant)
        shapes = {name: shape_in_file(name, a, rank, layout.style) for name, a in nlc.param_shapes(spec).items()}
        if layout.style is GAN:
            shapes["norm.weight"] = ()  # one gain
        for start in ("", f"layer3{layout.style.separator}nl{layout.style.separator}"):
            named = {start + every[name]: shapes[name] for every in (keys, twins) for name in shapes if name in every}
            yield json.dumps(named).encode()


def read_state_dict(path):
    """Find and read the blocks among keys and shapes; what is no such list is no matter of the reader."""
    try:
        shapes = json.loads(path.read_bytes())
        state_dict = {key: np.zeros(shape[:6], "f4") for key, shape in shapes.items() if np.prod(shape[:6]) < 10**6}
    except Exception as error:
        message = "no list of shapes"
        raise ValueError(message) from error
    found = nlc.find_peer_blocks(state_dict)
    return [
        nlc.from_peer(state_dict, peer=peer, prefix=prefix, scale=None, norm_epsilon=1e-5) for prefix, peer in found
    ]


def pictures():
    """Return PNG and JPEG files."""
    noise = np.random.default_rng(0).integers(0, 256, (9, 12, 4), dtype="uint8")
    for mode, form, options in itertools.product(
        ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), ("PNG", "JPEG"), ({}, {"progressive": True})
    ):
        if options if form == "PNG" else mode not in {"L", "RGB"}:
            continue
        buffer = io.BytesIO()
        image = Image.fromarray(noise[..., 0].astype("uint16") * 257) if mode == "I;16" else Image.fromarray(noise)
        (image if mode == "I;16" else image.convert("RGBA").convert(mode)).save(buffer, form, **options)
        yield buffer.getvalue()


def results():
    """Return results of benchmarks."""
    name, axes = "forward.Forward.time_forward", [["'torch'", "'jax'"], ["1024", "2048"]]
    data = {
        "commit_hash": "ab" * 20,
        "date": 1700000000000,
        "params": {"machine": "m", "cpu": "c", "num_cpu": "2", "ram": "1", "python": "3.11", "torch": "2"},
        "requirements": {"torch": "2"},
        "results": {name: [[1.0, None, 2.0, float("nan")], axes]},
        "notes": {"forward.Forward": {"'torch', 2048": "killed"}},
    }
    yield json.dumps(data).encode()


def read_results(path):
    """Read the results of one commit."""
    folder = path.with_name("results")
    (folder / "machine").mkdir(parents=True, exist_ok=True)
    about = {"forward.Forward.time_forward": {"param_names": ["backend", "positions"]}}
    (folder / "benchmarks.json").write_text(json.dumps(about), encoding="utf-8")
    (folder / "machine" / "one.json").write_bytes(path.read_bytes())
    return load(folder)


def is_whole(found):
    """Return whether parameters are all that a spec says."""
    params, spec = found
    return {name: a.shape for name, a in params.items()} == nlc.param_shapes(spec)


READERS = {
    "weights": Reader(nlc.load_params, weights, is_whole, 4),
    "caffe2": Reader(nlc.read_caffe2, pickles, lambda found: all(a.dtype.kind in "biuf" for a in found.values()), 200),
    "state dicts": Reader(read_state_dict, state_dicts, lambda found: all(map(is_whole, found)), 100),
    "specs": Reader(
        lambda path: nlc.NonLocalSpec.from_json(path.read_bytes().decode()),
        lambda: [spec.to_json().encode() for spec in SPECS],
        lambda spec: nlc.NonLocalSpec.from_json(spec.to_json()) == spec,
        100,
        errors=(TypeError, ValueError),
    ),
    "pictures": Reader(
        lambda path: picture.read(path, 16, PIXELS),
        pictures,
        lambda image: image.shape[2] in {1, 3} and image.min() >= 0 and image.max() <= 1,
        4,
        2**26 + 32 * PIXELS,
    ),
    "results": Reader(read_results, results, lambda run: isinstance(run, Run), 200),
}

TOKEN = re.compile(rb"-?\d+(?:\.\d+)?(?:e-?\d+)?|\"[^\"]*\"|true|false|null")
EXTREMES = [b"-1", b"0", b"1e999", b"1e-320", b"NaN", b"9" * 50, b"2147483648", b"true", b"null", b'"x"', b"[]", b"{}"]
EXTREMES += [b"[" * 2000, b"4" * 5000, b"0.5", b'"\\ud800"', b'"\\u0000"', b'"all"', b"[1,1]", b"1000000"]


@functools.cache
def seeds_of(name):
    """Return the whole files of a reader."""
    return list(READERS[name].seeds())


def changed(name, number):
    """Return the file of a number: a whole one, changed in some places."""
    rng = random.Random(f"{name} {number}")  # noqa: S311 - no secret
    content = rng.choice(seeds_of(name))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        if content.startswith(b"\x89PNG") and rng.random() < 0.6:
            content = _changed_png(content, rng)
        elif name == "weights" and len(content) > 8 and rng.random() < 0.8:
            size = int.from_bytes(content[:8], "little")
            header = _changed_text(content[8 : 8 + size], rng)
            content = len(header).to_bytes(8, "little") + header + content[8 + size :]
        elif name in {"specs", "results", "state dicts"} and rng.random() < 0.8:
            content = _changed_text(content, rng)
        else:
            content = _changed_bytes(content, rng, rng.choice(seeds_of(name)))
    return content


def _changed_bytes(content, rng, other):
    start, size = rng.randrange(len(content) + 1), rng.choice((1, 1, 2, 4, 8, 30))
    cut = rng.randrange(len(other))
    piece = rng.choice(
        [
            b"",
            rng.randbytes(size),
            b"\xff" * size,
            b"\0" * size,
            b"\x7f" + b"\xff" * size,
            content[start : start + size] * rng.choice((2, 3, 1000)),
            other[cut : cut + rng.randrange(1, 60)],
        ]
    )
    kept = rng.choice((start, start + size, start + len(piece)))
    return content[:start] + piece + (content[kept:] if rng.random() < 0.95 else b"")


def _changed_text(content, rng):
    tokens = list(TOKEN.finditer(content))
    if not tokens or rng.random() < 0.1:
        return _changed_bytes(content, rng, content or b"{}")
    one, other = rng.choice(tokens), rng.choice(tokens)
    value = rng.choice([*EXTREMES, other[0], one[0] + b"," + other[0], one[0] + b":" + other[0] + b"," + one[0]])
    return content[: one.start()] + value + content[one.end() :]


def _changed_png(content, rng):
    """Change one chunk of a PNG file, and let its check sum follow."""
    chunks, at = [], 8
    while at + 8 <= len(content):
        size = int.from_bytes(content[at : at + 4], "big")
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + size]))
        at += 12 + size
    if not chunks:
        return _changed_bytes(content, rng, content)
    number = rng.randrange(len(chunks))
    kind, body = chunks[number]
    if kind == b"IHDR" and rng.random() < 0.5:
        body = b"".join(rng.choice((0, 1, 999, 2000, 65535, 2**31 - 1)).to_bytes(4, "big") for _ in range(2)) + body[8:]
    elif kind == b"IDAT" and rng.random() < 0.5:
        body = zlib.compress(rng.randbytes(rng.randrange(99)) + bytes(rng.choice((0, 10**5, 10**7))))
    else:
        body = _changed_bytes(body, rng, body or b"\0")
    extra = [
        (rng.choice((b"zTXt", b"iCCP", b"eXIf", b"acTL", b"tRNS", b"fcTL")), b"a\0\0" + zlib.compress(bytes(10**6)))
    ]
    chunks[number : number + 1] = [(kind, body), *(extra if rng.random() < 0.2 else [])]
    sums = ((kind, body, zlib.crc32(kind + body)) for kind, body in chunks)
    return content[:8] + b"".join(len(b).to_bytes(4, "big") + k + b + c.to_bytes(4, "big") for k, b, c in sums)


def outcome(name, number, path):
    """Read the file of a number and return what came of it: "read", "refused", or what must not be."""
    reader, content = READERS[name], changed(name, number)
    path.write_bytes(content)

    def attempt():
        try:
            found = reader.read(path)
        except reader.errors as error:
            return "refused" if len(str(error)) < 3000 + len(str(path)) else "long message"
        except BaseException as error:  # noqa: BLE001 - a panic of Rust is none of the usual
            return f"undocumented {type(error).__name__}: {error}"[:300]
        return "read" if reader.holds(found) else "half"

    start = time.process_time()
    with warnings.catch_warnings(action="ignore"):
        result, peak = peak_resident(attempt)
    if peak is not None and peak > reader.base + reader.factor * len(content):
        return f"memory: {peak / 2**20:.0f} MiB for {len(content)} bytes"
    if time.process_time() - start > SECONDS + 1e-4 * len(content):
        return f"slow: {time.process_time() - start:.1f} s for {len(content)} bytes"
    return result


def run(name, first, most):
    """Read files from a number on, in this process, and write what came of each."""
    faulthandler.enable()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for number in itertools.count(first):
            if (time.monotonic() - start > most) if isinstance(most, float) else (number >= most):
                return
            faulthandler.dump_traceback_later(HANG, exit=True)
            sys.stdout.write(f"{number} {outcome(name, number, Path(folder, 'file'))!r}\n")
            sys.stdout.flush()


def main(most):
    """Read files with every reader, each in a process of its own, and print what came of them."""
    wrong = 0
    for name in READERS:
        counts, first, start = collections.Counter(), 0, time.monotonic()
        while True:
            left = most - (time.monotonic() - start) if isinstance(most, float) else most
            command = [sys.executable, __file__, "--run", name, str(first), repr(left)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
                for line in process.stdout:
                    number, _, result = line.partition(" ")
                    first = int(number) + 1
                    kind = result.strip().strip("'\"").partition(":")[0]
                    counts[kind] += 1
                    if kind not in {"read", "refused"}:
                        sys.stdout.write(f"{name}:{number} {result}")
            if process.returncode == 0:
                break
            kind = "crash" if process.returncode < 0 else "hang or crash"
            counts[kind] += 1
            sys.stdout.write(f"{name}:{first} {kind}, status {process.returncode}\n")
            first += 1
        wrong += sum(count for kind, count in counts.items() if kind not in {"read", "refused"})
        found = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        sys.stdout.write(f"{name}: {first} files in {time.monotonic() - start:.0f} s: {found}\n")
        sys.stdout.flush()
    sys.stdout.write(f"{wrong} of them must not be: crashes, hangs, undocumented types, half loads, memory\n")
    return min(wrong, 1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        run(sys.argv[2], int(sys.argv[3]), ast.literal_eval(sys.argv[4]))
    elif ":" in sys.argv[-1]:
        name, _, number = sys.argv[1].partition(":")
        with tempfile.TemporaryDirectory() as folder:
            sys.stdout.write(f"{changed(name, int(number))!r}\n{outcome(name, int(number), Path(folder, 'file'))}\n")
    else:
        parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
        parser.add_argument(
            "most", type=amount, help="how many files, or for how long, such as 600s; READER:NUMBER: one"
        )
        sys.exit(main(parser.parse_args().most))
