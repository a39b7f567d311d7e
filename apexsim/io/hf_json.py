"""Reading a ``config.json`` key by key: a missing or malformed one is named with its file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from apexsim.errors import BadInput, Unsupported
from apexsim.reading import read_object
from apexsim.specs.base import MAX_WHOLE


@dataclass(frozen=True)
class Config:
    """A config.json, or the ``text_config`` inside one: every question names its key when the answer is missing.

    ``seen`` collects the keys that were asked for: what is left was not understood.
    """

    where: str
    data: Mapping[str, Any]
    prefix: str = ""
    seen: set[str] = field(default_factory=set)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key; ``default`` where it is missing or null."""
        self.seen.add(key)
        value = self.data.get(key)
        return default if value is None else value

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if value is None:
            raise BadInput("is missing and has no default", where=self.where, key=self.prefix + key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_WHOLE:
            raise BadInput("give a whole number", where=self.where, key=self.prefix + key, got=value)
        return value

    def listed(self, key: str) -> list[Any] | None:
        value = self.get(key)
        if value is not None and not isinstance(value, list):
            raise BadInput("give a list", where=self.where, key=self.prefix + key, got=value)
        return value

    def mapping(self, key: str) -> Mapping[str, Any]:
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise BadInput("give a JSON object", where=self.where, key=self.prefix + key, got=value)
        return value

    def refuse(self, key: str, reason: str) -> Unsupported:
        return Unsupported(f"{self.where}: {self.prefix}{key}: {reason}")

    def demand(self, key: str, value: Any, reason: str) -> None:
        """Refuse a key that is set to anything but ``value``."""
        if self.get(key, value) != value:
            raise self.refuse(key, f"got {self.get(key)!r}; {reason}")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in a file; raises BadInput naming the file without one."""
    return read_object(path, would_do="give a JSON object: the config.json of a model")
