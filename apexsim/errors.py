"""Every error apexsim raises on purpose.

ApexsimError
├── BadInput         the user can mend it: says where, what was got, what would do   (exit status 2)
├── InfeasiblePlan   a lawful question with no feasible answer: says which bytes do not fit  (exit status 1)
└── Unsupported      asks for something the profile, model or engine has no cost for  (exit status 2)
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable

# A path or a key in a message; the longest path that a system takes is longer.
_MAX_PLACE = 300


class ApexsimError(Exception):
    """Root of the tree; catching it catches everything apexsim raises on purpose."""


class BadInput(ApexsimError):
    """Input that cannot be used as given.

    ``where`` is a file, a flag or an object; ``key`` the field in it. The message is always one line:
    ``where: key: got X; would_do``.
    """

    def __init__(self, would_do: str, *, where: object = None, key: str | None = None, got: object = ...) -> None:
        parts = [str(part) for part in (where, key) if part is not None]
        said = would_do if got is ... else f"got {_short(_repr(got))}; {would_do}"
        super().__init__(printable(": ".join([*map(_short_place, parts), said])))


class _Bounded(reprlib.Repr):
    """As ``repr``, but of something huge only the beginning is looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlong = 4, 100
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = 40
        self.maxstring = self.maxother = 200


_repr = _Bounded().repr


def printable(text: str) -> str:
    """``text`` in one line, other control characters (that could move a terminal's cursor) as escapes."""
    line = " ".join(text.split())
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)


def _short(text: str, most: int = 80) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _short_place(text: str) -> str:
    """A file and a key keep their end, which tells more than the beginning."""
    return text if len(text) <= _MAX_PLACE else f"...{text[3 - _MAX_PLACE :]}"


class InfeasiblePlan(ApexsimError):
    """A plan that cannot run here; ``reasons`` are sentences, memory shortages with their bytes."""

    def __init__(self, reasons: Iterable[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__("; ".join(self.reasons))

    def __reduce__(self) -> tuple[type[InfeasiblePlan], tuple[tuple[str, ...]]]:
        return (InfeasiblePlan, (self.reasons,))


class Unsupported(ApexsimError):
    """No measured or estimated cost exists for what was asked; nothing is made up in its place."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Sentence naming the known names closest to ``name``; all of them when none is close."""
    names, name = sorted(known), name[:_MAX_PLACE]
    close = difflib.get_close_matches(name.lower(), names, n=count, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known: {', '.join(names)}" if names else "none is known"
