"""Which layers of a config attend to everything, which to a window, and which keep a recurrent state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from apexsim.errors import BadInput
from apexsim.io.hf_json import Config
from apexsim.specs.model import LayerType

Layers = list[LayerType]

_TYPES: dict[str, LayerType] = {
    "full_attention": "full",
    "sliding_attention": "window",
    "chunked_attention": "window",
    "indexed_attention": "full",
    "linear_attention": "recurrent",
}


# What says which layers are which where ``layer_types`` does not.
LAYER_KEYS = (
    *("sliding_window", "use_sliding_window", "sliding_window_pattern", "max_window_layers", "hybrid_override_pattern"),
    *("full_attention_interval", "no_rope_layers", "no_rope_layer_interval"),
)

# Nemotron-H: one letter a layer, and how newer configs spell them.
_LETTERS: dict[str, LayerType] = {"M": "recurrent", "*": "full", "-": "ffn", "E": "ffn"}
_SPELT = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "mlp": "-", "moe": "E"}


def layer_fields(config: Config, default: Callable[[Config], Layers]) -> dict[str, Any]:
    """``layer_pattern`` and ``window`` of a spec, from ``layer_types`` or what the family means without it."""
    types = config.listed("layer_types")
    described = LAYER_KEYS if types is not None else ()
    config.seen.update(described)  # of no account beside layer_types
    if types is not None and (strange := [kind for kind in types if str(kind) not in _TYPES]):
        raise config.refuse("layer_types", f"{strange[0]} layers are not modelled")
    layers = default(config) if types is None else [_TYPES[kind] for kind in types]
    if len(layers) != config.whole("num_hidden_layers"):
        raise BadInput("give one entry a layer", where=config.where, key=config.prefix + "layer_types", got=len(layers))
    if set(layers) <= {"full"}:
        return {}
    pattern = {"layer_pattern": _shortest_pattern(layers)}
    if "window" not in layers:
        return pattern
    size = "attention_chunk_size" if config.get("attention_chunk_size") else "sliding_window"
    return pattern | {"window": config.whole(size)}


def _shortest_pattern(layers: Layers) -> tuple[LayerType, ...]:
    """The shortest run that, repeated over the layers, gives them all."""
    # Borders of every prefix (Knuth, Morris, Pratt): what is left beside the longest one is the period.
    borders = [0] * len(layers)
    for at in range(1, len(layers)):
        length = borders[at - 1]
        while length and layers[at] != layers[length]:
            length = borders[length - 1]
        borders[at] = length + (layers[at] == layers[length])
    return tuple(layers[: len(layers) - borders[-1]])


def _layers(config: Config, kind: LayerType, chosen: Callable[[int], bool]) -> Layers:
    """Layers of ``kind`` where ``chosen`` says so of a layer counted from 0; the others attend to everything."""
    return [kind if chosen(layer) else "full" for layer in range(config.whole("num_hidden_layers"))]


def _all_but_every(config: Config, kind: LayerType, period: int) -> Layers:
    return _layers(config, kind, lambda layer: period == 0 or (layer + 1) % period != 0)


def no_window(config: Config) -> Layers:
    """Full attention only; a window would be unknown for the family."""
    if config.get("sliding_window"):
        raise config.refuse("sliding_window", f"unknown for model_type {config.get('model_type')}")
    return _layers(config, "window", lambda layer: False)


def every_layer(config: Config) -> Layers:
    """Mistral: a window, where there is one, holds in every layer."""
    return _layers(config, "window", lambda layer: bool(config.get("sliding_window")))


def unused_window(config: Config) -> Layers:
    """SmolLM3: full attention, whatever the window is, as long as a switch leaves it unused."""
    config.demand("use_sliding_window", False, "windows are not known for this family")
    config.seen.add("sliding_window")
    return _layers(config, "window", lambda layer: False)


def late_layers(config: Config) -> Layers:
    """Qwen: layers from ``max_window_layers`` on, where windows are used."""
    window = config.get("sliding_window")
    if not config.get("use_sliding_window") or not window:
        return _layers(config, "window", lambda layer: False)
    first = config.whole("max_window_layers")
    return _layers(config, "window", lambda layer: layer >= first)


def every_other(config: Config) -> Layers:
    """gpt-oss and Gemma 2: windowed and full by turns."""
    return _layers(config, "window", lambda layer: layer % 2 == 0)


def five_of_six(config: Config) -> Layers:
    """Gemma 3: every ``sliding_window_pattern``-th layer attends to everything."""
    return _all_but_every(config, "window", config.whole("sliding_window_pattern", 6))


def rotated_layers(config: Config) -> Layers:
    """Llama 4: layers that rotate attend within chunks, the others (every fourth) to everything."""
    rotates = config.listed("no_rope_layers")  # 1 = rotates, despite its name
    if rotates:
        return ["window" if layer else "full" for layer in rotates]
    return _all_but_every(config, "window", config.whole("no_rope_layer_interval", 4))


def recurrent_layers(config: Config) -> Layers:
    """Qwen3-Next: every ``full_attention_interval``-th layer attends, the others keep a state."""
    return _all_but_every(config, "recurrent", config.whole("full_attention_interval", 4))


def every_fourth(config: Config) -> Layers:
    """OLMo 3, Cohere 2 and EXAONE 4: every ``sliding_window_pattern``-th layer attends to everything, else the fourth.

    EXAONE spells the pattern with a letter a layer too: L = windowed (local), G = full (global).
    """
    pattern = config.get("sliding_window_pattern", 4)
    if not config.get("sliding_window"):
        return _layers(config, "window", lambda layer: False)
    if not isinstance(pattern, str):
        return _all_but_every(config, "window", config.whole("sliding_window_pattern", 4))
    if not pattern or set(pattern) - {"L", "G"}:
        raise config.refuse("sliding_window_pattern", f"got {pattern!r}; known: L and G, a letter a layer")
    return _layers(config, "window", lambda layer: pattern[layer % len(pattern)] == "L")


def spelt_layers(config: Config) -> Layers:
    """Nemotron-H: M = Mamba-2, * = attention, - = FFN, E = experts."""
    return [_LETTERS[letter] for letter in spelt_pattern(config)[1]]


def spelt_pattern(config: Config) -> tuple[str, str]:
    """The key that says what Nemotron-H's layers are, and one letter a layer."""
    words = config.listed("layers_block_type")
    if words is not None:
        if strange := [word for word in words if str(word) not in _SPELT]:
            raise config.refuse("layers_block_type", f"{strange[0]} layers are not modelled")
        return "layers_block_type", "".join(_SPELT[word] for word in words)
    spelt = config.get("hybrid_override_pattern")
    if not isinstance(spelt, str):
        raise BadInput(
            "give one letter a layer", where=config.where, key=config.prefix + "hybrid_override_pattern", got=spelt
        )
    if strange := [letter for letter in spelt if letter not in _LETTERS]:
        raise config.refuse("hybrid_override_pattern", f"{strange[0]} layers are not modelled")
    return "hybrid_override_pattern", spelt
