"""The journal of a search or sweep: what has been run, so that an interrupted one can go on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from apexsim.errors import BadInput
from apexsim.specs.workload import Requests

# Goes up whenever the same specs come to mean something else (a default or a cost that changed): outcomes from before
# then answer other questions.
GENERATION = 2


def identity(data: Mapping[str, Any]) -> str:
    """Hash of the canonical JSON of ``data`` and ``GENERATION``. Specs in it are dumped without their defaults, so that
    a field added later does not orphan old journals."""
    canonical = json.dumps({"generation": GENERATION, **data}, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def fingerprint(requests: Requests) -> str:
    """Hash of the requests themselves: the same rows under another file name are the same workload."""
    waves = " waves" if requests.waves else ""
    digest = hashlib.sha256(f"{requests.concurrency} {requests.turnaround_s!r}{waves}".encode())
    for column in (requests.arrival_s, requests.prompt_tokens, requests.output_tokens):
        digest.update(b"-" if column is None else column.tobytes())
    for name in sorted(requests.extra):
        values = json.dumps(requests.extra[name].tolist(), default=lambda array: array.tolist())
        digest.update(f"{name} {values}".encode())
    return digest.hexdigest()[:32]


class Journal:
    """Append-only file of JSON lines ``{"identity": ..., "outcome": {...}}``; of equal identities the last one counts.

    ``known`` holds the outcomes to go on from: those in the file when ``resume`` is asked for, else none.
    """

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        self.path = path
        self.known: dict[str, dict[str, Any]] = dict(_entries(path)) if resume else {}

    def append(self, key: str, outcome: Mapping[str, Any]) -> None:
        """Add one outcome to the file."""
        line = json.dumps({"identity": key, "outcome": outcome}, allow_nan=False)
        # The newline comes first: whatever a crash left of the line before, this one starts on its own.
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"\n{line}")


def _entries(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot be read: {error}; choose another --out", where=path) from None
    for line in lines:
        try:
            entry = json.loads(line)
            yield entry["identity"], dict(entry["outcome"])
        except (ValueError, TypeError, KeyError):  # cut short by a crash, the empty first line, or not ours
            continue
