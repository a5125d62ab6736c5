"""Where blocks are put into a residual network, and what common networks call these places."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from nonlocal_core.arguments import check_choice, check_int
from nonlocal_core.errors import fail_type, fail_value

__all__ = ["places", "positions"]

Positions = Mapping[str, Sequence[int]]

# Wang et al., table 2c and section 4, the official configurations, and for 10 blocks in ResNet-101 gluon-cv; nobody
# has published places for ResNet-152, which follows the spacing of the others.
_PAPER: dict[tuple[int, int], dict[str, list[int]]] = {
    (50, 1): {"res4": [4]},
    (50, 5): {"res3": [1, 3], "res4": [1, 3, 5]},
    (50, 10): {"res3": [0, 1, 2, 3], "res4": [0, 1, 2, 3, 4, 5]},
    (101, 1): {"res4": [21]},
    (101, 5): {"res3": [1, 3], "res4": [6, 13, 20]},
    (101, 10): {"res3": [0, 1, 2, 3], "res4": [2, 6, 10, 14, 18, 22]},
    (152, 1): {"res4": [34]},
    (152, 5): {"res3": [3, 7], "res4": [11, 23, 35]},
    (152, 10): {"res3": [1, 3, 5, 7], "res4": [5, 11, 17, 23, 29, 35]},
}
# TSM and SlowOnly in mmaction2.
_MMACTION = {(50, 5): {"res3": [0, 2], "res4": [0, 2, 4]}}
_RECIPES = {"paper": _PAPER, "mmaction": _MMACTION}

_STAGES = ("res2", "res3", "res4", "res5")
_NAMINGS = {
    "torchvision, timm": r"(?P<host>.*\.)?layer(?P<stage>\d+)\.(layers\.)?(?P<block>\d+)",
    "transformers": r"(?P<host>.*\.)?stages\.(?P<stage>\d+)\.layers\.(?P<block>\d+)",
    "pytorchvideo": r"(?P<host>.*\.)?blocks\.(?P<stage>\d+)\.res_blocks\.(?P<block>\d+)",
    "keras.applications": r"(?P<host>.*[_/])?conv(?P<stage>\d+)_block(?P<block>\d+)_out",
}
"""What the places after residual blocks are called, in networks with four stages of blocks."""


def positions(depth: int = 50, blocks: int = 5, recipe: str = "paper") -> dict[str, list[int]]:
    """Return after which residual blocks of a ResNet the non-local blocks are put (section 4 of the paper).

    Args:
        depth: 50, 101 or 152.
        blocks: how many non-local blocks: 1, 5 or 10.
        recipe: "paper", or "mmaction" for the places that mmaction2's TSM and SlowOnly networks have (5 blocks in
            ResNet-50).

    Returns:
        From stage to the indices of its residual blocks, from 0.

    Raises:
        TypeError: if `recipe` is not a string.
        ValueError: if the recipe is unknown, or says nothing of that depth and number.

    Example:
        >>> positions(50, 5)
        {'res3': [1, 3], 'res4': [1, 3, 5]}
        >>> positions(101, 1)
        {'res4': [21]}
    """
    known = _RECIPES[check_choice("recipe", recipe, _RECIPES)]
    for argument, index, value in (("depth", 0, depth), ("blocks", 1, blocks)):
        offered = list(dict.fromkeys(key[index] for key in known))
        if check_int(argument, value, f"be one of {offered}") not in offered:
            raise fail_value(argument, f"be one of {offered} for the recipe {recipe!r}", repr(value))
    return {stage: list(indices) for stage, indices in known[depth, blocks].items()}


def places(names: Iterable[str], where: Positions) -> list[str]:
    """Return what a network calls the places after some residual blocks of its stages.

    The names of torchvision's and timm's ResNets (`layer3.4`), of transformers' (`stages.2.layers.4`), of
    pytorchvideo's (`blocks.3.res_blocks.4`) and of `keras.applications` (`conv4_block5_out`) are known, with
    any prefix.

    Args:
        names: the names of all layers or modules of the network.
        where: from stage, "res2" to "res5", to the indices of its residual blocks, as `positions` gives it.

    Returns:
        The names, in the order of the network.

    Raises:
        TypeError: if the indices of a stage are no list of ints.
        ValueError: if the names are of no known ResNet, or of several, or a stage or an index is not there.

    Example:
        >>> names = [f"layer{stage}.{i}" for stage, blocks in enumerate((3, 4, 6, 3), 1) for i in range(blocks)]
        >>> places(names, positions(50, 5))
        ['layer2.1', 'layer2.3', 'layer3.1', 'layer3.3', 'layer3.5']
    """
    found = _networks(names)
    if len(found) != 1:
        got = "none" if not found else f"{len(found)}: {', '.join(sorted(map(repr, found)))}"
        naming = ", ".join(_NAMINGS)
        raise fail_value("after", f"be names, since stages are known in one ResNet with names as in {naming}", got)
    (stages,) = found.values()
    unknown = [stage for stage in where if stage not in _STAGES]
    if unknown:
        raise fail_value("after", f"have stages among {', '.join(_STAGES)}", repr(unknown[0]))
    chosen = []
    for stage, names_of_stage in zip(_STAGES, stages, strict=True):
        indices = where.get(stage, ())
        if isinstance(indices, str) or not isinstance(indices, Sequence):
            raise fail_type("after", "have a list of indices for each stage", indices)
        rule = f"have indices below {len(names_of_stage)} in {stage}"
        for index in indices:
            if check_int("after", index, rule, least=0) >= len(names_of_stage):
                raise fail_value("after", rule, index)
            chosen.append(names_of_stage[index])
    return chosen


def _networks(names: Iterable[str]) -> dict[str, list[list[str]]]:
    """Return for each network with four stages the names of the places in each, by naming and prefix."""
    found: dict[str, dict[int, dict[int, str]]] = {}
    for name in names:
        for pattern in _NAMINGS.values():
            match = re.fullmatch(pattern, name)
            if match:
                network = (match["host"] or "") + pattern
                found.setdefault(network, {}).setdefault(int(match["stage"]), {})[int(match["block"])] = name
    return {
        network: [[blocks[i] for i in sorted(blocks)] for _, blocks in sorted(stages.items())]
        for network, stages in found.items()
        if len(stages) == len(_STAGES)
    }
