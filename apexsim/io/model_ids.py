"""Names of models as their publishers write them (``meta-llama/Llama-3.1-70B-Instruct``), matched with shipped ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from apexsim.errors import BadInput, nearest
from apexsim.io.words import QUANTISED

_ID = re.compile(r"(?:[\w.-]+/)?(?P<name>[\w.-]+)")
# Parts of a name that leave shape and dtype alone: how a model was tuned, who made it, bf16 said aloud.
_OF_NO_ACCOUNT = {"instruct", "it", "pt", "chat", "thinking", "base", "hf", "meta", "bf16"}
# Stand beside words of quantisation.
_WITH_QUANTISED = {"dynamic", "block", "kv", "quantized", "v2", "g128", "autoround"}


def _key(name: str, *, without: Iterable[str] = ()) -> str:
    """A name less its parts of no account, and less those of ``without``."""
    dropped = _OF_NO_ACCOUNT | set(without)
    kept = (separator + part for separator, part in _parts(name) if part not in dropped)
    return "".join(kept).lstrip("-.")


def _parts(name: str) -> list[tuple[str, str]]:
    """Parts of a name in small letters, each with the hyphen or dot before it."""
    return re.findall(r"(^|[-.])([^-.]+)", name.lower())


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
    words = [part for _, part in _parts(found["name"]) if part in QUANTISED]
    if words and (plain := known.get(_key(found["name"], without={*QUANTISED, *_WITH_QUANTISED}))):
        would_do = f"a quantised checkpoint of {plain}: give model {plain} with weights {QUANTISED[words[0]]}"
        raise BadInput(f"{would_do}, or import its config.json", where="model", got=text)
    if "/" not in text:
        return None
    like = nearest(_key(found["name"]), set(known.values()))
    raise BadInput(
        f"no such file, and no such shipped model; {like}; or import its config.json", where="model", got=text
    )
