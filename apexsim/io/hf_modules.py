"""Which parts of which layers a list of module names and patterns means: what a quantised checkpoint leaves alone."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Literal

from apexsim.specs.checkpoint import PART_NAMES, Part
from apexsim.specs.layers import LayerKind
from apexsim.specs.model import ModelSpec

Kept = dict[Part, tuple[int, ...] | Literal["all"]]
Matcher = Callable[[str], bool]
# A name of modules, or a regular expression of names.
Pattern = str | re.Pattern[str]

# What stands before ``layers.N`` in the names of modules, of text models and of those inside others.
_ROOTS = ("model.", "", "model.language_model.", "language_model.model.", "backbone.")
_GATED = ("gate_proj", "up_proj", "down_proj")
# Modules of a part inside a layer, one tuple for each way that families name and fuse them.
_MODULES: dict[str, tuple[tuple[str, ...], ...]] = {
    "attention": (
        tuple(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
        ("self_attn.qkv_proj", "self_attn.o_proj"),
        tuple(f"mixer.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
        ("self_attention.query_key_value", "self_attention.dense"),
    ),
    "latent": (
        tuple(f"self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")),
        tuple(f"self_attn.{name}" for name in ("q_proj", "kv_a_proj_with_mqa", "o_proj")),
        tuple(f"self_attn.{name}" for name in ("fused_qkv_a_proj", "q_b_proj", "o_proj")),
    ),
    "recurrent": (
        ("linear_attn.in_proj_qkvz", "linear_attn.out_proj"),
        ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.out_proj"),
        ("mixer.in_proj", "mixer.out_proj"),
    ),
    "ffn": (
        tuple(f"mlp.{name}" for name in _GATED),
        ("mlp.gate_up_proj", "mlp.down_proj"),
        tuple(f"feed_forward.{name}" for name in _GATED),
        ("mixer.up_proj", "mixer.down_proj"),
        ("fc1", "fc2"),
    ),
    "shared": (
        tuple(f"mlp.shared_experts.{name}" for name in _GATED),
        tuple(f"mlp.shared_expert.{name}" for name in _GATED),
        tuple(f"feed_forward.shared_expert.{name}" for name in _GATED),
        ("mixer.shared_experts.up_proj", "mixer.shared_experts.down_proj"),
    ),
    "experts": (
        tuple(f"mlp.experts.0.{name}" for name in _GATED),
        ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        tuple(f"block_sparse_moe.experts.0.{name}" for name in ("w1", "w2", "w3")),
        ("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),
        tuple(f"feed_forward.experts.0.{name}" for name in _GATED),
        ("mixer.experts.0.up_proj", "mixer.experts.0.down_proj"),
    ),
}


def kept_parts(spec: ModelSpec, patterns: Iterable[Pattern]) -> tuple[Kept, list[str]]:
    """Parts that the patterns leave alone, by layer, and names of parts of which they leave some modules alone.

    A pattern is a regular expression, a name with ``*`` in it, or a name: of a module, of what stands around it, or of
    any stretch of its path (``self_attn``).
    """
    matchers = _Matchers(list(dict.fromkeys(patterns)))
    kept: dict[Part, list[int]] = defaultdict(list)
    having: dict[Part, int] = defaultdict(int)
    partly: set[Part] = set()
    for layer in range(spec.layers):
        (kind,) = spec.kinds_of(range(layer, layer + 1))
        for part, modules in parts_of(spec, kind).items():
            having[part] += 1
            hits = [[matchers.match(layer, module) for module in each] for each in _MODULES[modules]]
            if any(all(each) for each in hits):
                kept[part].append(layer)
            elif any(any(each) for each in hits):
                partly.add(part)
    found: Kept = {part: "all" if len(layers) == having[part] else tuple(layers) for part, layers in kept.items()}
    return found, [PART_NAMES[part] for part in sorted(partly)]


def parts_of(spec: ModelSpec, kind: LayerKind) -> dict[Part, str]:
    """Parts of a layer, and which modules they are made of."""
    parts: dict[Part, str] = {}
    if kind.mixer:
        parts["mixer"] = "recurrent" if kind.mixer == "recurrent" else "latent" if spec.mla else "attention"
    if kind.ffn and kind.moe:
        parts["experts"] = "experts"
        if spec.moe and spec.moe.shared_width:
            parts["shared"] = "shared"
    elif kind.ffn:
        parts["ffn"] = "ffn"
    return parts


class _Matchers:
    """Patterns made ready: those that name one layer are looked at for that layer alone."""

    def __init__(self, patterns: list[Pattern]) -> None:
        self._of_layer: dict[int, list[Matcher]] = defaultdict(list)
        self._general: list[Matcher] = []
        for pattern in patterns:
            if isinstance(pattern, re.Pattern):
                self._general.append(_regex(pattern))
                continue
            plain = re.sub(r"^.*?(?=(?:^|\.)layers\.)", "", pattern).lstrip(".")
            named = re.match(r"layers\.(\d+)(?=$|\.|\*)", plain)
            if named:
                self._of_layer[int(named[1])].append(_name(plain))
            else:
                self._general.append(_name(plain))

    def match(self, layer: int, module: str) -> bool:
        name = f"layers.{layer}.{module}"
        return any(matcher(name) for matcher in (*self._general, *self._of_layer.get(layer, ())))


def _regex(pattern: re.Pattern[str]) -> Matcher:
    return lambda name: any(pattern.match(root + name) for root in _ROOTS)


def _name(pattern: str) -> Matcher:
    if "*" in pattern:
        return lambda name: any(
            fnmatchcase(root + name, pattern) or fnmatchcase(root + name, f"{pattern}.*") for root in _ROOTS
        )
    return lambda name: f".{pattern}." in f".{name}."
