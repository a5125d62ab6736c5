"""Which blocks of other implementations a state dict holds."""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping
from typing import Any

from nonlocal_core.files.peers.layouts import LAYOUTS
from nonlocal_core.files.peers.matching import check_state_dict, full_prefix, match, under
from nonlocal_core.spec.presets import PRESETS

__all__ = ["find_peer_blocks", "recognise"]

# Each block has one last projection.
_LAST = {
    (layout.style.separator, layout.keys(pooled=False, normed=normed)["out.weight"])
    for layout in LAYOUTS.values()
    for normed in (False, True)
}
_MOST = 64
"""More keys than any block has."""


def find_peer_blocks(state_dict: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the non-local blocks of other implementations in a state dict.

    Only the keys are looked at. A block counts if it has all keys of the implementation and no others. Where two
    implementations have the same keys, `from_peer` reads the block under either name, and the one given here is

    - "mmcv", not "mmdet2019", which has the same without pooling;
    - "alexhex7", not "gluon", which has the same without norm and pooling;
    - "official" for video-nonlocal-net with batch norm, "official_affine" without norm or with a frozen one.

    Args:
        state_dict: from names to arrays of any library.

    Returns:
        The name of each block, without the separator that follows it ("" if the whole state dict is one block), with
        its implementation: a name in `nonlocal_core.spec.presets.PRESETS`.

    Raises:
        TypeError: if `state_dict` is not a mapping from names.
        ValueError: if it holds other mappings, one of which may be the state dict.

    Example:
        >>> names = ("theta", "phi", "g", "W")
        >>> find_peer_blocks({f"module.nl_1.{name}.weight": None for name in names})
        [('module.nl_1', 'alexhex7')]
    """
    check_state_dict(state_dict)
    prefixes = dict.fromkeys(
        name.removesuffix(key).removesuffix(separator)
        for name in state_dict
        for separator, key in sorted(_LAST)
        if name == key or name.endswith(separator + key)
    )
    kept = {
        layout.style.ignored: sorted(name for name in state_dict if not name.endswith(layout.style.ignored))
        for layout in LAYOUTS.values()
    }
    rank = functools.cache(_rank)  # the blocks of one network have the same keys
    found = {}
    for prefix in prefixes:
        below = {
            peer: _below(kept[layout.style.ignored], full_prefix(prefix, layout.style.separator))
            for peer, layout in LAYOUTS.items()
        }
        found[prefix] = _most_usual(below, rank)
    return [(prefix, peer) for prefix, peer in found.items() if peer is not None]


def recognise(state_dict: Mapping[str, Any], prefix: str) -> str | None:
    """Return the implementation of the block called `prefix`: of several, the one to which its norm is most usual."""
    below = {peer: under(state_dict, prefix, layout.style.separator) for peer, layout in LAYOUTS.items()}
    return _most_usual(below, _rank)


def _below(names: list[str], start: str) -> tuple[str, ...]:
    """Return the rest of the names that begin with `start`, in order; of more than any block has, the first."""
    first = bisect_left(names, start)
    return tuple(name.removeprefix(start) for name in names[first : first + _MOST] if name.startswith(start))


def _most_usual(names: Mapping[str, Collection[str]], rank: Callable[..., int | None]) -> str | None:
    """Return the implementation to which the norm is most usual, from the keys of the block for each."""
    usual = {peer: found for peer, keys in names.items() if (found := rank(peer, keys)) is not None}
    return min(usual, key=usual.__getitem__, default=None)


def _rank(peer: str, names: Collection[str]) -> int | None:
    """Return the place of the norm among those of an implementation; None: these are not the keys of its block."""
    block = match(peer, names)
    return PRESETS[peer].norms.index(block.told["norm"]) if block.is_whole else None
