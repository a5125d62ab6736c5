"""What the keys of a block tell of it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from nonlocal_core.errors import fail_type, fail_value
from nonlocal_core.files.peers.layouts import LAYOUTS
from nonlocal_core.spec import NonLocalSpec
from nonlocal_core.spec.options import Bias
from nonlocal_core.spec.parameters import STATISTICS, param_shapes
from nonlocal_core.spec.presets import PRESETS, Preset

__all__ = ["Match", "check_state_dict", "full_prefix", "match", "under"]

_PARALLEL = "module."
_SHOWN = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Match:
    """The keys of a block, compared with those of one implementation.

    Args:
        keys: from the canonical parameters of the block to their keys.
        twins: from some of them to a second key that is there too.
        forms: the pairwise forms that have these parameters.
        told: the options that follow: `norm` and `bias`.
        pooled: whether the block pools; None: the keys do not tell.
        missing: keys that should be there.
        unknown: keys that should not.
    """

    keys: dict[str, str]
    twins: dict[str, str]
    forms: tuple[str, ...]
    told: dict[str, Any]
    pooled: bool | None
    missing: list[str]
    unknown: list[str]

    @property
    def is_whole(self) -> bool:
        """Whether these are the keys of a block, all of them and no others."""
        return not self.missing and not self.unknown

    @property
    def is_none(self) -> bool:
        """Whether these are no keys of a block at all."""
        return {self.keys["g.weight"], self.keys["out.weight"]} <= set(self.missing)

    def __str__(self) -> str:
        """Say what is missing and what is unknown, with near names."""
        return f"missing {_some(self.missing)}, unknown {_some(self.unknown, self.keys.values())}"


def match(peer: str, names: Iterable[str]) -> Match:
    """Compare keys with those of an implementation.

    Args:
        peer: its name.
        names: the keys, without what stands before them.
    """
    layout, preset = LAYOUTS[peer], PRESETS[peer]
    present = dict.fromkeys(name for name in names if not name.endswith(layout.style.ignored))
    every = layout.keys(pooled=True, normed=True)
    pooled = bool(layout.pooled) and every["g.weight"] in present
    names_of_norm = [*every.items(), *layout.second_keys(pooled=True, normed=True).items()]
    has_norm = any(key in present for name, key in names_of_norm if name.startswith("norm."))
    normed = has_norm or None not in preset.norms
    keys, second = layout.keys(pooled=pooled, normed=normed), layout.second_keys(pooled=pooled, normed=normed)
    keys |= {name: key for name, key in second.items() if key in present and keys[name] not in present}
    found = {name for name, key in keys.items() if key in present}
    forms = _forms(found, preset)
    told: dict[str, Any] = {"norm": _norm(found, preset), "bias": _bias(found, forms[0])}
    needed = param_shapes(NonLocalSpec(channels=1, pairwise=forms[0], **told))
    keys = {name: keys[name] for name in needed if name in keys}
    twins = {name: key for name, key in second.items() if key in present and keys.get(name, key) != key}
    expected = {*keys.values(), *twins.values()}
    return Match(
        keys=keys,
        twins=twins,
        forms=forms,
        told=told,
        pooled=pooled if layout.pooled else None,
        missing=[key for name, key in keys.items() if name not in found],
        unknown=[key for key in present if key not in expected],
    )


def _forms(found: Collection[str], preset: Preset) -> tuple[str, ...]:
    """Return the forms of the implementation that have such layers."""
    if "concat.weight" in found:
        return ("concatenation",)
    if "gaussian" in preset.forms and not any(name.startswith(("theta", "phi")) for name in found):
        return ("gaussian",)
    return tuple(form for form in preset.forms if form in {"embedded_gaussian", "dot_product"})


def _norm(found: Collection[str], preset: Preset) -> str | None:
    if not any(name.startswith("norm.") for name in found) and None in preset.norms:
        return None
    statistics = not set(STATISTICS).isdisjoint(found)
    return "affine" if "affine" in preset.norms and not statistics else "batch"


def _bias(found: Collection[str], form: str) -> Bias:
    """Return which layers have a bias: theta, phi and g have it together in every implementation."""
    layers = NonLocalSpec(channels=1, pairwise=form).layers
    shared = any(f"{layer}.bias" in found for layer in ("theta", "phi", "g"))
    return Bias({layer: f"{layer}.bias" in found if layer in {"concat", "out"} else shared for layer in layers})


def check_state_dict(state_dict: Any) -> None:
    """Check that a state dict is a mapping from names, and not one that holds the state dict."""
    rule = "be a mapping from names to arrays"
    if not isinstance(state_dict, Mapping):
        raise fail_type("state_dict", rule, state_dict)
    for name in state_dict:
        if not isinstance(name, str):
            raise fail_type("state_dict", "have strings for keys", name)
    nested = [name for name, value in state_dict.items() if isinstance(value, Mapping)]
    if nested:
        raise fail_value("state_dict", rule, f"mappings within it, under {nested}")


def full_prefix(prefix: Any, separator: str) -> str:
    """Return what stands before the keys of the block called `prefix`, which may end in the separator or not."""
    if not isinstance(prefix, str):
        raise fail_type("prefix", "be a string", prefix)
    return prefix.removesuffix(separator) + separator if prefix else ""


def under(names: Collection[str], prefix: Any, separator: str) -> dict[str, str]:
    """Return the keys of the block called `prefix`, each with its name in the file.

    Where every name begins with "module.", as PyTorch's DataParallel writes it, the prefix may leave that out.
    """
    start = full_prefix(prefix, separator)
    if not start.startswith(_PARALLEL) and all(name.startswith(_PARALLEL) for name in names):
        start = _PARALLEL + start
    return {name.removeprefix(start): name for name in names if name.startswith(start)}


def _some(keys: Collection[str], known: Collection[str] = ()) -> str:
    """List some keys, each with a near one of those known."""
    shown = list(keys)[:_SHOWN]
    near = [difflib.get_close_matches(key, known, n=1) for key in shown]
    listed = [repr(key) + "".join(f" (near {one!r})" for one in found) for key, found in zip(shown, near, strict=True)]
    return ", ".join(listed + ([f"{len(keys) - _SHOWN} more"] if len(keys) > _SHOWN else [])) or "none"
