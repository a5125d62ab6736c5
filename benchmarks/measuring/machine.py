"""What this machine is, and which commit is measured."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["PROBES", "QUIET", "ROOT", "frameworks_of", "git", "gpu_name", "slug", "version_of"]

ROOT = Path(__file__).parents[2]

QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_FORCE_GPU_ALLOW_GROWTH": "true", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
"""The environment in which TensorFlow and JAX leave memory of a GPU to others, and say little."""

PROBES = {
    "torch": "import torch; name = torch.cuda.get_device_name() if '{0}' == 'cuda' else 'cpu'",
    "jax": "import jax; name = jax.devices('{0}')[0].device_kind",
    "tensorflow": (
        "import tensorflow as tf; device = tf.config.list_physical_devices('{1}')[0]; "
        "name = tf.config.experimental.get_device_details(device).get('device_name', '{0}')"
    ),
}
"""What finds the name of the device, by framework."""


def git(*arguments: str) -> str:
    """Return what git prints.

    Raises:
        RuntimeError: if it fails.
    """
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip())
    return done.stdout


def gpu_name() -> str:
    """Return what the first GPU is."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()


def frameworks_of(device: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return the name of the device by each framework that sees it, and why the others do not."""
    other = "GPU" if device == "cuda" else "CPU"
    started = {
        name: subprocess.Popen(
            [sys.executable, "-c", f"{code.format(device, other)}\nprint(name)"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **QUIET},
        )
        for name, code in PROBES.items()
    }
    seen, missing = {}, {}
    for name, process in started.items():
        out, err = process.communicate()
        if process.returncode == 0:
            seen[name] = out.splitlines()[-1]
        else:
            missing[name] = (err.strip().splitlines() or ["it said nothing"])[-1]
    return seen, missing


def version_of(framework: str) -> str:
    """Return the version of a framework that is installed."""
    for name in (framework, f"{framework}-cpu"):
        with suppress(PackageNotFoundError):
            return version(name)
    return "of unknown version"


def slug(name: str) -> str:
    """Return a name as one of a file."""
    return re.sub(r"\W+", "-", name).lower()
