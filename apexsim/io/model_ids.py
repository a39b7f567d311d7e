"""Names of models as their publishers write them (``meta-llama/Llama-3.1-70B-Instruct``), matched with shipped ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from apexsim.errors import BadInput, nearest

_ID = re.compile(r"(?:[\w.-]+/)?(?P<name>[\w.-]+)")
# Parts of a name that leave shape and dtype alone: how a model was tuned, who made it, bf16 said aloud.
_OF_NO_ACCOUNT = {"instruct", "it", "pt", "chat", "thinking", "base", "hf", "meta", "bf16"}
# Parts that say how a checkpoint was quantised, and the weights that they mean.
_QUANTISED = {
    "fp8": "fp8, or fp8_block where scales are those of blocks",
    "awq": "int4_wo",
    "gptq": "int4_wo (int8_wo for 8 bits)",
    "int4": "int4_wo",
    "w4a16": "int4_wo",
    "int8": "int8_wo",
    "w8a16": "int8_wo",
    "w8a8": "int8",
    "nvfp4": "nvfp4",
    "fp4": "nvfp4",
    "mxfp4": "mxfp4",
}
# Stand beside those.
_WITH_QUANTISED = {"dynamic", "block", "kv", "quantized", "v2", "g128", "autoround"}


def _key(name: str, *, without: Iterable[str] = ()) -> str:
    """A name less its parts of no account, and less those of ``without``."""
    dropped = _OF_NO_ACCOUNT | set(without)
    return "-".join(part for part in name.lower().split("-") if part not in dropped)


def published_names(name: str, source: str) -> list[str]:
    """What a shipped model answers to: its own name, and those of the checkpoints that its source mentions."""
    return [_key(each) for each in (name, *re.findall(r"[\w.-]+/([\w-]+(?:\.[\w-]+)*)", source))]


def shipped_name(text: str, known: Mapping[str, str]) -> str | None:
    """The shipped model that a published name means; ``known`` maps ``published_names`` to shipped ones.

    None for a bare name that means none of them. Raises BadInput for a quantised checkpoint of one, with the weights to
    ask for, and for a name with its owner that means none.
    """
    found = _ID.fullmatch(text)
    if not found:
        return None
    if exact := known.get(_key(found["name"])):
        return exact
    words = [part for part in found["name"].lower().split("-") if part in _QUANTISED]
    if words and (plain := known.get(_key(found["name"], without={*_QUANTISED, *_WITH_QUANTISED}))):
        would_do = f"a quantised checkpoint of {plain}: give model {plain} with weights {_QUANTISED[words[0]]}"
        raise BadInput(f"{would_do}, or import its config.json", where="model", got=text)
    if "/" not in text:
        return None
    like = nearest(_key(found["name"]), set(known.values()))
    raise BadInput(
        f"no such file, and no such shipped model; {like}; or import its config.json", where="model", got=text
    )
