"""The faulty implementations and the checks that reject them: run this file to see them as a table."""

import sys
import warnings
import zlib

import numpy as np
import torch
from faulty import (
    FAULTS,
    derivatives,
    dtypes,
    forms,
    interface,
    layers,
    masks,
    methods,
    networks,
    norms,
    numerics,
    positions,
    sharded,
    state,
)

from nonlocal_conformance.registry import bind

TOPICS = (
    positions,
    forms,
    masks,
    norms,
    derivatives,
    methods,
    numerics,
    interface,
    layers,
    networks,
    state,
    dtypes,
    sharded,
)


def pairs():
    """Return each fault with each of the checks that must reject it."""
    return [(fault, check) for fault in FAULTS.values() for check in fault.checks]


def rejection(fault, check):
    """Return what a check says of a fault on the first case on which it rejects it; None if there is none."""
    # Like cases stand together in the list; mixed up, one that finds the fault comes sooner.
    applying = [bound for bound in bind(fault.driver()) if bound.check.name == check]
    for bound in sorted(applying, key=lambda bound: zlib.crc32(bound.id.encode())):
        try:
            with np.errstate(all="ignore"):
                bound()
        except fault.raises as error:
            return " ".join(f"{error}".split())
    return None


def line(fault, check, message):
    """Return one line of the table."""
    return f"{fault.name:64} {check:24} {'NOT REJECTED' if message is None else message[:120]}"


def main():
    """Print the table; the exit status is 1 if a check does not reject a fault that it must reject."""
    warnings.simplefilter("ignore")  # a fault may well deserve one
    torch.set_num_threads(1)  # arrays this small only wait for other threads
    missed = set()
    for fault, check in pairs():
        message = rejection(fault, check)
        missed |= {fault.name} if message is None else set()
        sys.stdout.write(line(fault, check, message) + "\n")
    sys.stdout.write(f"{len(FAULTS)} faults, {len(pairs())} rejections, {len(missed)} faults not rejected\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
