"""Versions of engines as people and images write them: ``0.11.0``, ``v0.19.1-cu130``, ``1.0.0rc3``, ``nightly``."""

from __future__ import annotations

import re

from packaging.version import InvalidVersion, Version

# What stands before a build's own mark, such as -cu130, without what says "any": 0.11.* and 0.11.x are 0.11.
_HEAD = re.compile(r"\s*([^-_\s]*?)(?:\.[*x])*(?![^-_\s])", re.IGNORECASE)


def version_in(text: str) -> Version | None:
    """The version that ``text`` begins with; None for nightlies, development builds and the empty text."""
    match = _HEAD.match(text)
    try:
        return Version(match[1]) if match else None
    except InvalidVersion:
        return None


def begins(version: str, series: str) -> bool:
    """Whether ``version`` is of a series: 0.1.5 and 0.1rc2 are of 0.1, and 0.11 is not."""
    found, wanted = version_in(version), version_in(series)
    if found is None or wanted is None:
        return False
    return found.release[: len(wanted.release)] == wanted.release
