"""Reasons of many plans, told as few: alike but for their numbers, they are one reason with ranges."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

_NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")


def counted(reasons: Iterable[str] | Mapping[str, int]) -> list[tuple[int, str]]:
    """How many reasons there are of each kind, the most frequent first, and what they say; given one by one or counted.

    A number that differs among them is given as a range: ``tensor degree 3 to 7 does not divide the 8 KV heads``.
    """
    kinds: dict[str, list[list[str]]] = {}
    counts: Counter[str] = Counter()
    for reason, times in Counter(reasons).items():
        kind = _NUMBER.sub("\0", reason)
        kinds.setdefault(kind, []).append(_NUMBER.findall(reason))
        counts[kind] += times
    found = [(counts[text], _worded(text, numbers)) for text, numbers in kinds.items()]
    return sorted(found, key=lambda each: (-each[0], each[1]))


def number_of(count: int, noun: str) -> str:
    """How many there are of a thing whose plural ends in s: ``1 device``, ``1,024 requests``."""
    return f"{count:,} {noun}" + "s" * (count != 1)


def _worded(text: str, numbers: list[list[str]]) -> str:
    first, *parts = text.split("\0")
    spans = [_span(column) for column in zip(*numbers, strict=True)]
    return first + "".join(span + part for span, part in zip(spans, parts, strict=True))


def _span(column: Iterable[str]) -> str:
    found = sorted(set(column), key=lambda number: (float(number.replace(",", "")), number))
    return found[0] if len(found) == 1 else f"{found[0]} to {found[-1]}"
