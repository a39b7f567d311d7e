"""Operator times, computed once per process and looked up ever after.

Whatever costs by rows is kept in blocks of 64 row counts; decode attention as integer prefix sums over the mean
context, one table per batch size. Both grow as they are asked for, and belong to a device profile, not to a plan: plans
that share shapes share tables, which is what makes a search cheap.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from apexsim.costs.attention import SharedLaunch
from apexsim.costs.fitted import OperatorCosts
from apexsim.costs.forms.hardware import Array
from apexsim.costs.mixing import ChunkCost, Mixing
from apexsim.costs.operators import Attention, RowOperator
from apexsim.errors import BadInput
from apexsim.specs.device import DeviceProfile
from apexsim.units import NS_PER_S, to_ns

Counted = Sequence[tuple[RowOperator, int]]

BLOCK = 64
FIRST_CONTEXTS = 1024
# Decode tables of 8-byte integers and remembered chunks kept per device: 64 MB and some 25 MB at most.
MAX_DECODE_ENTRIES = 8_000_000
MAX_CHUNKS = 100_000
# Half of what 63 bits of nanoseconds hold: a prefix table doubles, so all before its last part is less than that part.
MAX_TABLE_S = 4e9


def to_ns_array(seconds: Array) -> NDArray[np.int64]:
    """Seconds to whole nanoseconds, rounded to the nearest; BadInput where their sum could not be held."""
    if not seconds.sum() < MAX_TABLE_S:
        raise BadInput("its operators take longer than the clock can count; check its rates", where="device profile")
    return np.rint(seconds * NS_PER_S).astype(np.int64)


class PrefixTable:
    """Integer times T(0), T(1), ... of decode attention over the mean context, as ``prefix[i]`` = T(0) + ... + T(i-1).

    T(m) is ``prefix[m + 1] - prefix[m]`` and a run of n steps from m is ``prefix[m + n] - prefix[m]``: a run equals its
    steps by construction. T never falls with context (attending to more cannot be faster): whatever dips is held at the
    level reached before. ``prefix`` is only ever extended, so a reference to it stays good.
    """

    __slots__ = ("_evaluate", "_reached_s", "prefix")

    def __init__(self, evaluate: Callable[[Array], Array]) -> None:
        """``evaluate`` gives seconds at an array of mean contexts >= 1."""
        self._evaluate = evaluate
        self._reached_s = 0.0
        self.prefix = array("q", [0])

    def grow(self, context: int) -> int:
        """Make T(context) answerable; returns how many entries were added. Sizes double, so growing is rare."""
        have = len(self.prefix) - 1
        want = max(FIRST_CONTEXTS, 1 << context.bit_length())
        if want <= have:
            return 0
        contexts = np.maximum(np.arange(have, want, dtype=np.float64), 1.0)
        seconds = np.maximum.accumulate(np.maximum(self._evaluate(contexts), self._reached_s))
        self._reached_s = float(seconds[-1])
        self.prefix.frombytes((np.cumsum(to_ns_array(seconds)) + self.prefix[-1]).tobytes())
        return want - have

    def at(self, context: int) -> int:
        """T(context) in nanoseconds."""
        prefix = self.prefix
        if context + 1 >= len(prefix):
            self.grow(context)
        return prefix[context + 1] - prefix[context]

    def between(self, start: int, end: int) -> int:
        """T(start) + ... + T(end - 1)."""
        if end >= len(self.prefix):
            self.grow(end)
        return self.prefix[end] - self.prefix[start]


class ChunkTable(dict[tuple[int, int], int]):
    """Chunk attention of one layer: (tokens, history) to nanoseconds, worked out when first asked for.

    Without the launch of the kernel: a step pays ``launch_ns`` once, or not at all (see ``StepCost``).
    """

    def __init__(self, cost: ChunkCost) -> None:
        super().__init__()
        self._cost = cost
        self.launch_ns = to_ns(cost.launch_s)

    def __missing__(self, chunk: tuple[int, int]) -> int:
        if len(self) >= MAX_CHUNKS:
            self.clear()
        found = self[chunk] = to_ns(self._cost(*chunk, launch=False))
        return found


class RowTable(dict[int, tuple[int, ...]]):
    """Operators that cost by rows, added up: row count to nanoseconds on every stage, filled in blocks of 64 counts."""

    def __init__(self, tables: OperatorTables, stages: Sequence[Counted]) -> None:
        """``stages`` are the operators of each stage, with how often each runs in a step."""
        super().__init__({0: (0,) * len(stages)})
        self._tables = tables
        self._stages = stages

    def __missing__(self, rows: int) -> tuple[int, ...]:
        block = (rows - 1) // BLOCK
        columns = [self._block_ns(operators, block) for operators in self._stages]
        first = block * BLOCK + 1
        self.update(zip(range(first, first + BLOCK), zip(*columns, strict=True), strict=True))
        return self[rows]

    def _block_ns(self, operators: Counted, block: int) -> list[int]:
        seconds = np.zeros(BLOCK)
        for operator, count in operators:
            seconds += count * self._tables.block_s(operator, block)
        nanoseconds: list[int] = to_ns_array(seconds).tolist()
        return nanoseconds


class OperatorTables:
    """Times of one device's operators, remembered."""

    def __init__(self, costs: OperatorCosts) -> None:
        self.costs = costs
        self._rows: dict[tuple[RowOperator, int], Array] = {}
        self._decode: dict[tuple[Mixing, int], PrefixTable] = {}
        self._chunks: dict[Mixing, ChunkTable] = {}

    def block_s(self, operator: RowOperator, block: int) -> Array:
        """Seconds at row counts 64 block + 1 ... 64 block + 64."""
        key = (operator, block)
        found = self._rows.get(key)
        if found is None:
            rows = np.arange(block * BLOCK + 1, (block + 1) * BLOCK + 1, dtype=np.float64)
            found = self._rows[key] = operator.seconds(self.costs, rows)
        return found

    def rows_s(self, operator: RowOperator, rows: NDArray[np.int64]) -> Array:
        """Seconds at arbitrary row counts >= 1."""
        blocks, where = np.unique((rows - 1) // BLOCK, return_inverse=True)
        known = np.array([self.block_s(operator, int(block)) for block in blocks]).reshape(-1, BLOCK)
        return np.asarray(known[where, (rows - 1) % BLOCK])

    def decode(self, attention: Mixing, batch: int) -> PrefixTable:
        """Decode attention of one layer for ``batch`` sequences, over their mean context."""
        key = (attention, batch)
        found = self._decode.get(key)
        if found is None:
            costs = self.costs
            found = PrefixTable(lambda contexts: attention.decode_s(costs, batch, contexts))
            self._decode[key] = found
        return found

    def chunks(self, attention: Mixing) -> ChunkTable:
        """Chunk attention of one layer."""
        found = self._chunks.get(attention)
        if found is None:
            found = self._chunks[attention] = ChunkTable(attention.chunk_cost(self.costs))
        return found

    def shared_launch(self, attention: Mixing) -> SharedLaunch | None:
        """Cost of chunks and decodes of one layer in one launch; None where their costs add up."""
        return self.costs.shared_launch(attention.shape) if isinstance(attention, Attention) else None

    def trim(self) -> None:
        """Forget decode tables once they have grown too large together; runs that hold some keep theirs."""
        if sum(len(table.prefix) for table in self._decode.values()) > MAX_DECODE_ENTRIES:
            self._decode.clear()


@dataclass(frozen=True)
class _ProfileKey:
    """A profile that hashes by its content: equal profiles in one process share their tables."""

    fingerprint: str
    profile: DeviceProfile = field(compare=False)


def tables_for(profile: DeviceProfile) -> OperatorTables:
    """The tables of a device profile in this process."""
    fingerprint = hashlib.sha256(profile.model_dump_json().encode()).hexdigest()
    return _tables(_ProfileKey(fingerprint, profile))


@lru_cache(maxsize=8)
def _tables(key: _ProfileKey) -> OperatorTables:
    return OperatorTables(OperatorCosts(key.profile))
