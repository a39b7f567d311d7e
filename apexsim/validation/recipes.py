"""What the published launch scripts of a benchmark set and the rows of its results do not say.

``recipes.yaml`` holds the facts, each with the script it was read from; they are not fits. Where no script is at hand,
a comment says what in the rows shows it. What a row states itself outweighs them but for the layout of its plan, where
a script decides; what neither says is the engine's default.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from apexsim.io.words import EngineOption
from apexsim.io.yaml_files import load_spec
from apexsim.specs.base import Spec
from apexsim.specs.engine import token_budget
from apexsim.validation.runs import RunRow
from apexsim.versions import version_in

_TABLE = "recipes.yaml"

_Layout = Literal["expert_always", "tensor_only", "data_ranks", "no_data_ranks", "squared"]
_Rule = Literal[
    "concurrency", "concurrency_less_1", "concurrency_from_128", "twice_concurrency_to_512", "one_prompt",
    "one_prompt_or_1024", "one_prompt_or_8192", "two_prompts", "10_or_30_from_16", "16384_or_32768_from_64",
    "16_or_32_from_128",
]  # fmt: skip

# The value of an option, given requests in flight and prompt tokens; "from" in a name counts requests in flight.
_RULES: Mapping[_Rule, Callable[[int, int], int]] = {
    "concurrency": lambda clients, prompt: clients,
    "concurrency_less_1": lambda clients, prompt: clients - 1,
    "concurrency_from_128": lambda clients, prompt: max(128, clients),
    "twice_concurrency_to_512": lambda clients, prompt: min(512, 2 * clients),  # vLLM's own, given the seats
    "one_prompt": lambda clients, prompt: token_budget(prompt_tokens=prompt, sequences=clients),
    "one_prompt_or_1024": lambda clients, prompt: _RULES["one_prompt"](clients, max(1024, prompt)),
    "one_prompt_or_8192": lambda clients, prompt: max(8192, _RULES["one_prompt"](clients, prompt)),
    "two_prompts": lambda clients, prompt: 2 * prompt,
    "10_or_30_from_16": lambda clients, prompt: 30 if clients >= 16 else 10,
    "16384_or_32768_from_64": lambda clients, prompt: 32_768 if clients >= 64 else 16_384,
    "16_or_32_from_128": lambda clients, prompt: 32 if clients >= 128 else 16,
}


def version_numbers(version: str) -> tuple[float, ...]:
    """The release of a version to compare by, ``v1.1.0rc2`` as 1.1.0.

    One without numbers (empty, nightly) is later than all, as the engine profile that answers for it is the newest.
    """
    found = version_in(version)
    return found.release if found else (math.inf,)


class When(Spec):
    """The runs that a recipe is for: all that is given must hold, of a list any.

    ``sources``, ``models`` and ``devices`` are prefixes, ``labels`` those of versions that are no numbers.
    ``tensor`` and ``expert`` are degrees as rows label them.
    """

    sources: tuple[str, ...] = ("inferencex", "nvidia")
    models: tuple[str, ...] = ("",)
    devices: tuple[str, ...] = ("",)
    weights: tuple[str, ...] | None = None
    from_version: str | None = None
    below_version: str | None = None
    labels: tuple[str, ...] | None = None
    tensor: tuple[int, ...] | None = None
    expert: tuple[int, ...] | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    from_concurrency: int = 0

    def holds(self, row: RunRow) -> bool:
        """Whether a row is one of those runs."""
        named = (self.sources, row.source), (self.models, row.model), (self.devices, row.device)
        among = (self.weights, row.weight_dtype), (self.tensor, row.tensor), (self.expert, row.expert)
        lengths = (self.prompt_tokens, row.prompt_tokens), (self.output_tokens, row.output_tokens)
        return (
            all(name.startswith(prefixes) for prefixes, name in named)
            and all(known is None or value in known for known, value in among)
            and all(tokens is None or tokens == value for tokens, value in lengths)
            and (row.concurrency or 0) >= self.from_concurrency
            and self._has_version(row.engine_version)
        )

    def _has_version(self, version: str) -> bool:
        if self.labels is not None:
            return version.startswith(self.labels)
        numbers, first, last = version_numbers(version), self.from_version, self.below_version
        return (first is None or numbers >= version_numbers(first)) and (
            last is None or numbers < version_numbers(last)
        )


class Recipe(Spec):
    """How an engine was launched for the runs of ``when``; ``script`` (path@commit) says so, None where none does.

    ``rules`` are options that follow from the load. ``plan`` is how the script reads the degrees of a row:
    ``expert_always`` spreads experts over all ranks whatever the row says; ``tensor_only`` knows no other degree;
    ``squared`` has the square of the tensor degree for it, and the degree itself for that of expert parallelism;
    ``data_ranks`` makes all devices of the tensor degree ranks of data-parallel attention where a row has them, and
    ``no_data_ranks`` takes those for expert parallelism alone. ``no_term`` is for readers.
    """

    engine: str
    when: When
    script: str | None = None
    kv_dtype: str | None = None
    options: dict[str, EngineOption] = Field(default_factory=dict)
    rules: dict[str, _Rule] = Field(default_factory=dict)
    plan: _Layout | None = None
    no_term: tuple[str, ...] = ()


class RecipeTable(Spec):
    """The recipes of a benchmark, the first that serves a run first; ``repository`` holds their scripts."""

    repository: str
    recipes: tuple[Recipe, ...]


@dataclass(frozen=True)
class Launch:
    """Engine options, KV dtype (None: not said) and degrees that a benchmark's script gave a run."""

    options: Mapping[str, Any] = field(default_factory=dict)
    kv_dtype: str | None = None
    degrees: Mapping[str, int] = field(default_factory=dict)


@cache
def recipes() -> tuple[Recipe, ...]:
    """The shipped recipes, in the order in which they are tried."""
    return load_spec(RecipeTable, Path(str(resources.files("apexsim.validation") / _TABLE))).recipes


def launched(row: RunRow) -> Launch:
    """How the benchmark behind a row launches its engine; empty where no recipe serves it."""
    recipe = next((each for each in recipes() if each.engine == row.engine and each.when.holds(row)), None)
    if recipe is None:
        return Launch()
    return Launch({**recipe.options, **_of_load(recipe, row)}, recipe.kv_dtype, _degrees(recipe.plan, row))


def _of_load(recipe: Recipe, row: RunRow) -> dict[str, int]:
    """Options that follow from requests in flight and prompts; none where a row lacks either."""
    if row.concurrency is None or row.prompt_tokens is None:
        return {}
    return {option: _RULES[rule](row.concurrency, row.prompt_tokens) for option, rule in recipe.rules.items()}


def _degrees(plan: _Layout | None, row: RunRow) -> dict[str, int]:
    """Degrees that differ from those of a row because its script lays them out otherwise."""
    tensor, ranks, expert = row.tensor or 1, row.attention_data or 1, row.expert or 1
    laid_out = {
        "expert_always": (tensor, ranks, tensor * ranks),
        "squared": (expert, ranks, 1) if tensor == expert**2 else (tensor, ranks, expert),
        "tensor_only": (tensor, 1, 1),
        "data_ranks": (1, tensor, tensor) if ranks > 1 else (tensor, ranks, expert),
        "no_data_ranks": (tensor, 1, tensor if ranks > 1 else expert),
        None: (tensor, ranks, expert),
    }[plan]
    names = ("tensor", "attention_data", "expert")
    said = (tensor, ranks, expert)
    return {name: new for name, new, old in zip(names, laid_out, said, strict=True) if new != old}
